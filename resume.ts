/**
 * A download on the local disk until it is whole: the part file, its JSON resume log and its lock.
 *
 * `NAME` is written as `NAME.part`, with `NAME.resume.json` beside it saying which version it is of and how many of its
 * bytes are there and checked. Only a whole file, synced, takes the name `NAME`. The log is replaced by a rename and
 * thus never half a log; what the part holds beyond the log's count is not trusted and is fetched again. A part that
 * does not fit its log is kept aside under a name of its own, and said.
 */
import {
  closeSync,
  existsSync,
  fstatSync,
  ftruncateSync,
  mkdirSync,
  readFileSync,
  renameSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { basename, dirname } from "node:path";
import {
  crc32Of,
  Held,
  isInMemory,
  isStill,
  openLocked,
  type Release,
  removeIfThere,
  setTime,
  syncFolder,
  syncTogether,
  unlock,
  WriteQueue,
} from "./disk.ts";
import { type Meta, quote, RepriseError } from "./protocol.ts";

/** The log is written again when this much is new, in bytes or milliseconds: what a kill -9 may cost at the most. */
const SAVE_BYTES = 16 * 1024 * 1024;
const SAVE_MS = 50;
/** Segments that a log may name. */
export const MAX_SEGMENTS = 64;

/** `NAME.resume.json`. Other programs may read it; these fields are a contract. */
export interface ResumeLog {
  command: "get" | "put";
  /** On the server. */
  path: string;
  /** As the user named it. */
  server: string;
  /** Of the source: the server's for a download, the local file's for an upload. */
  etag: string;
  /** Bytes, of the whole file. */
  size: number;
  /** Microseconds since 1970. */
  mtime: number;
  /** From the start: of a download held and checked, of an upload sent. */
  bytes: number;
  /** Of these bytes. */
  crc32: number;
  /** Of a download in several segments: those behind the first, which `bytes` and `crc32` are about. */
  segments?: SegmentLog[];
  /** Of an upload: the local file, and the name by which the server knows what it holds of it. */
  file?: string;
  id?: string;
  /** And its condition, if it has one. */
  noClobber?: boolean | undefined;
  ifEtag?: string | undefined;
}

/** `bytes` are held from `offset` on, of what goes up to `end`. The first segment ends where the second begins. */
export interface SegmentLog {
  offset: number;
  end: number;
  bytes: number;
  crc32: number;
}

/** Where a download goes: a file, or a range of one. All before the position `bytes` is there, of the version `etag`. */
export interface Target {
  readonly etag: string;
  readonly bytes: number;
  /** Where the range ends; undefined: with the file. */
  readonly end: number | undefined;
  /** Whether `reset` can take back what was written. */
  readonly restartable: boolean;
  /** Called with each answer's META: the version that is coming. */
  begin(meta: Meta): void;
  /** Appends a chunk whose crc32 has been checked, and takes its memory over until it calls `free` with it. */
  append(chunk: Uint8Array, crc32: number, free: Release): Promise<void>;
  /** All that was appended is with the operating system, and the log says so. */
  settle(): Promise<void>;
  /** Back to nothing of no version. */
  reset(): void;
}

export const PART_SUFFIX = ".part";
export const LOG_SUFFIX = ".resume.json";
export const LOCK_SUFFIX = ".lock";
/** Behind a hash. */
export const FOLDER_LOG_SUFFIX = ".put-r.json";

/** The suffixes above, and that of a log on its way to replace another. */
const UNFINISHED = /\.part(\.lock)?$|\.resume\.json(\.lock|\.new)?$|\.[0-9a-f]{1,16}\.put-r\.json$/;

/** Whether a name is one that an unfinished transfer leaves: never listed, sent or taken for a file of the user's. */
export function isUnfinished(name: string): boolean {
  return UNFINISHED.test(name);
}

// ---------------------------------------------------------------------------------------------------- file

export class PartFile {
  readonly destination: string;
  readonly #path: string;
  readonly #server: string;
  readonly #fd: number;
  #segments: Segment[] = [];
  #meta: Meta | undefined;
  #savedBytes = -1;
  #savedAt = 0;

  /**
   * Takes the part of `destination`, and its lock, and goes on where its log says. `note` is told what was found wrong.
   * Throws `local`: a folder in the way, no permission, or another process that writes it.
   */
  static async open(
    destination: string,
    path: string,
    server: string,
    note: (text: string) => void,
  ): Promise<PartFile> {
    try {
      checkDestination(destination);
      mkdirSync(dirname(destination), { recursive: true });
      const fd = openPart(destination);
      try {
        const found = await takeUp(destination, path, fd, note);
        if (found !== "aside") return new PartFile(destination, path, server, fd, found);
      } catch (error) {
        letGo(destination, fd);
        throw error;
      }
      letGo(destination, fd);
      return new PartFile(destination, path, server, openPart(destination), undefined);
    } catch (error) {
      throw asLocal(error, destination);
    }
  }

  /** Removes what an earlier download left beside a file that is whole. */
  static clear(destination: string): void {
    try {
      const fd = openPart(destination);
      removeIfThere(destination + LOG_SUFFIX);
      removeIfThere(destination + PART_SUFFIX);
      letGo(destination, fd);
    } catch (error) {
      throw asLocal(error, destination);
    }
  }

  private constructor(destination: string, path: string, server: string, fd: number, found: ResumeLog | undefined) {
    this.destination = destination;
    this.#path = path;
    this.#server = server;
    this.#fd = fd;
    if (found) this.#meta = { kind: "file", size: found.size, mtime: found.mtime, etag: found.etag };
    this.#segments = segmentsOf(found).map((log) => new Segment(this, log));
    if (!found?.segments) ftruncateSync(fd, this.bytes);
  }

  get etag(): string {
    return this.#meta?.etag ?? "";
  }

  /** All that is held, in whatever segments. */
  get bytes(): number {
    return this.#segments.reduce((sum, segment) => sum + segment.bytes - segment.start, 0);
  }

  /** Ranges of the file, each a target of its own; one for all of it as long as it was not split. */
  get segments(): readonly Segment[] {
    return this.#segments;
  }

  get fd(): number {
    return this.#fd;
  }

  /** Shares out what is missing of `meta` among `count` segments, unless an earlier attempt has done so. */
  split(meta: Meta, count: number): void {
    const [first, ...others] = this.#segments;
    if (!first || others.length > 0) return;
    const held = first.bytes;
    const cuts = Array.from(
      { length: count + 1 },
      (_, index) => held + Math.floor(((meta.size - held) * index) / count),
    );
    this.#meta = meta;
    this.#segments = cuts.slice(0, -1).map((offset, index) => {
      const end = cuts[index + 1]!;
      return new Segment(this, index === 0 ? { ...first.log, end } : { offset, end, bytes: 0, crc32: 0 });
    });
    this.#save();
  }

  begin(meta: Meta): void {
    this.#meta = meta;
    this.#save();
  }

  saveIfDue(): void {
    const { bytes } = this;
    const due = bytes - this.#savedBytes >= SAVE_BYTES || performance.now() - this.#savedAt >= SAVE_MS;
    if (due && bytes > this.#savedBytes) this.#save();
  }

  /** After a failed write: what no log counts is of no use; on a full disk it is the room that the log needs. */
  cut(): void {
    if (this.#segments.length === 1) ftruncateSync(this.#fd, this.bytes);
    this.saveIfNew();
  }

  saveIfNew(): void {
    if (this.#meta && this.bytes !== this.#savedBytes) this.#save();
  }

  /** Back to nothing of no version, in one segment. */
  reset(): void {
    removeIfThere(this.destination + LOG_SUFFIX);
    this.#meta = undefined;
    ftruncateSync(this.#fd, 0);
    const [first] = this.#segments;
    this.#segments = [first!];
    first!.restart();
    this.#savedBytes = -1;
  }

  /** The whole file is there: checks the size, syncs, sets the time, and gives it its name. Throws `local`. */
  async finish(): Promise<void> {
    for (const segment of this.#segments) await segment.settle();
    const meta = this.#meta!;
    try {
      ftruncateSync(this.#fd, meta.size);
      setTime(this.#fd, meta.mtime);
      await this.#sync();
      placePart(this.destination, this.#fd);
      removeIfThere(this.destination + LOG_SUFFIX);
      await syncFolder(dirname(this.destination));
    } catch (error) {
      throw asLocal(error, this.destination);
    }
  }

  /** After a failed fsync the system may show content that the disk does not have: such a part is not gone on with. */
  async #sync(): Promise<void> {
    const [failure] = isInMemory(this.#fd) ? [] : await syncTogether([this.#fd]);
    if (!failure) return;
    setAside(this.destination);
    removeIfThere(this.destination + LOG_SUFFIX);
    throw failure;
  }

  /** Forgets the download: no part and no log are left. */
  discard(): void {
    removeIfThere(this.destination + LOG_SUFFIX);
    removeIfThere(this.destination + PART_SUFFIX);
  }

  /** Lets go of the lock. */
  close(): void {
    letGo(this.destination, this.#fd);
  }

  #save(): void {
    const { etag, size, mtime } = this.#meta!;
    const [{ bytes, crc32 }, ...others] = this.#segments.map((segment) => segment.log) as [SegmentLog, ...SegmentLog[]];
    const log: ResumeLog = { command: "get", path: this.#path, server: this.#server, etag, size, mtime, bytes, crc32 };
    if (others.length > 0) log.segments = others;
    writeLog(this.destination + LOG_SUFFIX, log);
    this.#savedBytes = this.bytes;
    this.#savedAt = performance.now();
  }
}

/** A range of a part. */
export class Segment implements Target {
  readonly start: number;
  readonly #part: PartFile;
  #end: number | undefined;
  #queue: WriteQueue;

  constructor(part: PartFile, log: Omit<SegmentLog, "end"> & { end?: number | undefined }) {
    this.#part = part;
    this.start = log.offset;
    this.#end = log.end;
    this.#queue = this.#queueFrom(log.offset + log.bytes, log.crc32);
  }

  get etag(): string {
    return this.#part.etag;
  }
  get bytes(): number {
    return this.#queue.bytes;
  }
  get end(): number | undefined {
    return this.#end;
  }
  get restartable(): boolean {
    return this.#part.segments.length === 1;
  }
  get log(): SegmentLog {
    const { bytes, crc32 } = this.#queue;
    return { offset: this.start, end: this.#end ?? 0, bytes: bytes - this.start, crc32 };
  }

  begin(meta: Meta): void {
    this.#part.begin(meta);
  }

  async append(chunk: Uint8Array, crc32: number, free: Release): Promise<void> {
    await this.#queue.append(chunk, crc32, free);
    this.#part.saveIfDue();
  }

  async settle(): Promise<void> {
    try {
      await this.#queue.settle();
    } catch (error) {
      this.#part.cut();
      throw error;
    }
    this.#part.saveIfNew();
  }

  reset(): void {
    this.#part.reset();
  }

  /** The part's way of resetting it: all of the file, from its start. */
  restart(): void {
    this.#end = undefined;
    this.#queue = this.#queueFrom(0, 0);
  }

  #queueFrom(bytes: number, crc32: number): WriteQueue {
    const wrap = (error: unknown) => asLocal(error, this.#part.destination);
    return new WriteQueue(this.#part.fd, { seekable: true, wrap, bytes, crc32 });
  }
}

function segmentsOf(log: ResumeLog | undefined): (Omit<SegmentLog, "end"> & { end?: number | undefined })[] {
  const { bytes = 0, crc32 = 0, segments = [] } = log ?? {};
  return [{ offset: 0, end: segments[0]?.offset, bytes, crc32 }, ...segments];
}

/** Gives a part that is whole and synced its name. Throws `local` if the part's name is no longer that of `fd`. */
export function placePart(destination: string, fd: number): void {
  if (!isStill(destination + PART_SUFFIX, fd)) {
    throw local(`cannot finish ${quote(destination)}: something else took the name of its part; get it again`);
  }
  renameSync(destination + PART_SUFFIX, destination);
}

/** Replaces a log, so that it is never half a log. Throws `local`. */
export function writeLog(name: string, log: ResumeLog): void {
  try {
    writeFileSync(`${name}.new`, `${JSON.stringify(log)}\n`);
    renameSync(`${name}.new`, name);
  } catch (error) {
    removeIfThere(`${name}.new`);
    throw asLocal(error, name.slice(0, -LOG_SUFFIX.length));
  }
}

/** Reads a log. Undefined where there is none; a text that says what is wrong with it otherwise. */
export function readLog(name: string): ResumeLog | string | undefined {
  let text: string;
  try {
    if (!statSync(name).isFile()) return `the resume log ${quote(basename(name))} is no file`;
    text = readFileSync(name, "utf8");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw asLocal(error, name);
  }
  try {
    const log = JSON.parse(text) as ResumeLog;
    if (isLog(log)) return log;
  } catch {
    // Falls through to the same words: not JSON, or JSON of another kind.
  }
  return `the resume log ${quote(basename(name))} is damaged`;
}

function isLog(log: ResumeLog): boolean {
  const isText = (value: unknown) => typeof value === "string" && value !== "";
  const isCount = (value: unknown) => Number.isSafeInteger(value) && (value as number) >= 0;
  const common = [log.path, log.server, log.etag].every(isText) && [log.size, log.bytes, log.crc32].every(isCount);
  if (!common || log.bytes > log.size || !Number.isSafeInteger(log.mtime)) return false;
  if (log.command === "put") return isText(log.file) && /^[0-9a-f]{32}$/.test(String(log.id));
  return log.command === "get" && fitTogether(log);
}

/** Segments follow each other without a gap up to the end of the file. */
function fitTogether({ segments, bytes, size }: ResumeLog): boolean {
  if (segments === undefined) return true;
  if (!Array.isArray(segments) || segments.length === 0 || segments.length >= MAX_SEGMENTS) return false;
  if (!(bytes <= segments[0]!.offset)) return false;
  return segments.every(({ offset, end, bytes, crc32 }, index) => {
    const counts = [offset, end, bytes, crc32].every((value) => Number.isSafeInteger(value) && value >= 0);
    return counts && offset + bytes <= end && end === (segments[index + 1]?.offset ?? size);
  });
}

/** The log to go on by, or none; "aside" after a part that does not fit was put away. `note` is told why. */
async function takeUp(
  destination: string,
  path: string,
  fd: number,
  note: (text: string) => void,
): Promise<ResumeLog | "aside" | undefined> {
  const { size } = fstatSync(fd);
  if (size === 0 && !existsSync(destination + LOG_SUFFIX)) return undefined;
  const found = await recall(destination, path, fd, size);
  if (typeof found === "object") return found;
  const aside = size > 0 ? setAside(destination) : undefined;
  note(`${found}; starting again${aside ? `, and the old part is kept as ${quote(aside)}` : ""}`);
  removeIfThere(destination + LOG_SUFFIX);
  return aside ? "aside" : undefined;
}

/** What the log and the part say together: where to go on, or what is wrong. */
async function recall(destination: string, path: string, fd: number, size: number): Promise<ResumeLog | string> {
  const log = readLog(destination + LOG_SUFFIX);
  const name = quote(basename(destination + PART_SUFFIX));
  if (log === undefined) return `${name} has no resume log`;
  if (typeof log === "string") return log;
  if (log.command !== "get") return `the resume log of ${name} is that of an upload`;
  if (log.path !== path) return `${name} is a part of another file, ${quote(log.path)}`;
  for (const { offset, bytes, crc32 } of segmentsOf(log)) {
    const end = bytes === 0 ? 0 : offset + bytes;
    if (size < end) return `${name} is shorter than its resume log says, ${size} bytes instead of ${end}`;
    if ((await crc32Of(fd, offset, bytes)) !== crc32) return `${name} was damaged since it was written`;
  }
  return log;
}

function setAside(destination: string): string {
  for (let number = 1; ; number++) {
    const aside = `${destination}.aside-${number}${PART_SUFFIX}`;
    if (existsSync(aside)) continue;
    renameSync(destination + PART_SUFFIX, aside);
    return aside;
  }
}

function openPart(destination: string): number {
  return openLocked(destination + PART_SUFFIX);
}

function letGo(destination: string, fd: number): void {
  unlock(fd, destination + PART_SUFFIX);
  closeSync(fd);
}

/** A served file must not pass for a log or a part of ours: the next start would believe it. */
export function checkDestination(destination: string): void {
  if (isUnfinished(destination)) {
    throw local(`cannot write ${quote(destination)}: such names are for unfinished transfers; choose one with -o`);
  }
  if (statSync(destination, { throwIfNoEntry: false })?.isDirectory()) {
    throw local(`${quote(destination)} is a folder; use -d to put files into it`);
  }
}

// ---------------------------------------------------------------------------------------------------- stream

/** A descriptor that takes bytes once: standard output, a pipe, a device. Only this process can go on with it. */
export class StreamTarget implements Target {
  readonly restartable = false;
  readonly end = undefined;
  readonly #queue: WriteQueue;
  #etag = "";

  constructor(fd: number, name: string) {
    this.#queue = new WriteQueue(fd, { seekable: false, wrap: (error) => asLocalStream(error, name) });
  }
  get etag(): string {
    return this.#etag;
  }
  get bytes(): number {
    return this.#queue.bytes;
  }
  begin(meta: Meta): void {
    this.#etag = meta.etag;
  }
  append(chunk: Uint8Array, crc32: number, free: Release): Promise<void> {
    return this.#queue.append(chunk, crc32, free);
  }
  settle(): Promise<void> {
    return this.#queue.settle();
  }
  close(): void {
    this.#queue.close();
  }
  reset(): void {
    if (this.bytes > 0) throw new Error("What went into a stream cannot be taken back");
    this.#etag = "";
  }
}

// ---------------------------------------------------------------------------------------------------- errors

/** The same of what goes into a stream: nothing of that is kept. */
function asLocalStream(error: unknown, name: string): RepriseError {
  const { code = "" } = error as NodeJS.ErrnoException;
  if (!["ENOSPC", "EDQUOT", "EFBIG"].includes(code)) return asLocal(error, name);
  const why = code === "EFBIG" ? "the file is larger than the system allows" : "no room is left there";
  return new RepriseError("local", `cannot write ${quote(name)}: ${why}`, error);
}

const LOCAL_REASONS: Record<string, string> = {
  ENOSPC: "the disk is full; what has arrived is kept, make room and get it again",
  EDQUOT: "the quota is used up; what has arrived is kept, make room and get it again",
  EFBIG: "the file is larger than the system allows; what has arrived is kept",
  EACCES: "no permission",
  EPERM: "no permission",
  EROFS: "the file system is read-only",
  ENOTDIR: "a part of the path is a file",
  ENAMETOOLONG: "the name is too long, with its log beside it; choose a shorter one with -o",
  ELOOP: "its part is a symbolic link",
  EISDIR: "a folder is in the way",
  ENXIO: "nobody reads it",
};

/** Any error of the local file system as a `local` one, in words. */
export function asLocal(error: unknown, name: string): RepriseError {
  if (error instanceof RepriseError) return error;
  if (error instanceof Held) {
    return local(`${quote(name)} is being written by ${error.holder}; wait for it, or choose another name`);
  }
  const { code, message } = error as NodeJS.ErrnoException;
  // The reader of our output went away: no failure of ours, and nobody is left to tell.
  if (code === "EPIPE") return new RepriseError("pipe_closed", undefined, error);
  return new RepriseError("local", `cannot write ${quote(name)}: ${LOCAL_REASONS[code ?? ""] ?? message}`, error);
}

function local(text: string): RepriseError {
  return new RepriseError("local", text);
}
