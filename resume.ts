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
  constants,
  existsSync,
  fstatSync,
  fsyncSync,
  ftruncateSync,
  futimesSync,
  lstatSync,
  mkdirSync,
  openSync,
  readFileSync,
  readSync,
  renameSync,
  statSync,
  unlinkSync,
  writeFileSync,
  writeSync,
  writev,
} from "node:fs";
import { basename, dirname } from "node:path";
import { Errno, libc } from "./libc.ts";
import { crc32Combine, type Meta, quote, RepriseError } from "./protocol.ts";

/** The log is written again when this much is new, in bytes or milliseconds: what a kill -9 may cost at the most. */
const SAVE_BYTES = 16 * 1024 * 1024;
const SAVE_MS = 50;
/** Bytes that wait for the write before theirs: what is received beside it and then goes out in one. */
const MAX_WAITING_BYTES = 1024 * 1024;

/** `NAME.resume.json`. Other programs may read it; these fields are a contract. */
export interface ResumeLog {
  command: "get";
  /** On the server. */
  path: string;
  /** As the user named it. */
  server: string;
  etag: string;
  /** Bytes, of the whole file. */
  size: number;
  /** Microseconds since 1970. */
  mtime: number;
  /** Held and checked, from the start of the part. */
  bytes: number;
  /** Of these bytes. */
  crc32: number;
}

type Release = (chunk: Uint8Array) => void;

/** Where a download goes. `bytes` of the version `etag` are there already. */
export interface Target {
  readonly etag: string;
  readonly bytes: number;
  /** Whether `reset` can take back what was written. */
  readonly restartable: boolean;
  /** Called with each answer's META: the version that is coming. */
  begin(meta: Meta): void;
  /** Appends a chunk whose crc32 has been checked, and takes its memory over until it calls `free` with it. */
  append(chunk: Uint8Array, crc32: number, free: Release): Promise<void>;
  /** All that was appended is with the operating system, and the log says so. */
  settle(): Promise<void>;
  /** Back to 0 bytes of no version. */
  reset(): void;
}

export const PART_SUFFIX = ".part";
export const LOG_SUFFIX = ".resume.json";
const LOCK_SUFFIX = ".part.lock";
/** A log on its way to replace another. */
const NEW_LOG_SUFFIX = `${LOG_SUFFIX}.new`;

/**
 * Chunks on their way to a descriptor: one write at a time, of all that waits, beside the receiving of further chunks.
 * They count once they are written. Positions are given, or none for what takes bytes in their order.
 */
class WriteQueue {
  readonly #fd: number;
  readonly #name: string;
  readonly #seekable: boolean;
  /** The same, where it can be had, as a descriptor that takes what fits and never waits. */
  readonly #eager: number | undefined;
  #waiting: { chunk: Uint8Array; crc32: number; free: Release }[] = [];
  #waitingBytes = 0;
  #writing: Promise<void> | undefined;
  #failure: unknown;
  bytes: number;
  /** Of these bytes; kept only where they can be read again. */
  crc32: number;

  constructor(fd: number, name: string, options: { seekable: boolean; bytes?: number; crc32?: number }) {
    this.#fd = fd;
    this.#name = name;
    this.#seekable = options.seekable;
    this.#eager = options.seekable ? undefined : openEager(fd);
    this.bytes = options.bytes ?? 0;
    this.crc32 = options.crc32 ?? 0;
  }

  /** Takes the chunk over. Waits, and so holds up the sender, while enough is waiting for one write. */
  async append(chunk: Uint8Array, crc32: number, free: Release): Promise<void> {
    // After a failure nothing more is taken: it would stand where the lost chunk belongs.
    if (this.#failure) throw this.#failure;
    const eager = this.#writing ? 0 : this.#writeEagerly(chunk);
    if (eager === chunk.length) return free(chunk);
    chunk = chunk.subarray(eager);
    this.#waiting.push({ chunk, crc32, free });
    this.#waitingBytes += chunk.length;
    this.#writing ??= this.#writeWaiting();
    while (this.#waitingBytes >= MAX_WAITING_BYTES) await this.#writing;
    if (this.#failure) throw this.#failure;
  }

  async settle(): Promise<void> {
    while (this.#writing) await this.#writing;
    const failure = this.#failure;
    this.#failure = undefined;
    if (failure) throw failure;
  }

  close(): void {
    if (this.#eager !== undefined) closeSync(this.#eager);
  }

  /** What a pipe or device takes at once needs no thread; returns how much that was. */
  #writeEagerly(chunk: Uint8Array): number {
    if (this.#eager === undefined) return 0;
    try {
      const count = writeSync(this.#eager, chunk);
      this.bytes += count;
      return count;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === "EAGAIN") return 0;
      throw asLocal(error, this.#name);
    }
  }

  /** Never throws: a failure waits for `append` or `settle` to be told, and what waited with it is dropped. */
  async #writeWaiting(): Promise<void> {
    const batch = this.#waiting.splice(0);
    this.#waitingBytes = 0;
    try {
      await writeAll(
        this.#fd,
        batch.map((item) => item.chunk),
        this.#seekable ? this.bytes : null,
        this.#name,
      );
      for (const { chunk, crc32 } of batch) {
        this.bytes += chunk.length;
        if (this.#seekable) this.crc32 = crc32Combine(this.crc32, crc32, chunk.length);
      }
    } catch (error) {
      this.#failure = error;
      this.#waiting = [];
      this.#waitingBytes = 0;
    }
    for (const { chunk, free } of batch) free(chunk);
    this.#writing = this.#waiting.length > 0 ? this.#writeWaiting() : undefined;
  }
}

// ---------------------------------------------------------------------------------------------------- file

export class PartFile implements Target {
  readonly restartable = true;
  readonly destination: string;
  readonly #path: string;
  readonly #server: string;
  readonly #fd: number;
  #queue: WriteQueue;
  #meta: Meta | undefined;
  #savedBytes = -1;
  #savedAt = 0;

  /**
   * Takes the part of `destination`, and its lock, and goes on where its log says. `note` is told what was found wrong.
   * Throws `local`: a folder in the way, no permission, or another process that writes it.
   */
  static open(destination: string, path: string, server: string, note: (text: string) => void): PartFile {
    try {
      checkDestination(destination);
      mkdirSync(dirname(destination), { recursive: true });
      const fd = openLocked(destination);
      try {
        const found = takeUp(destination, path, fd, note);
        if (found !== "aside") return new PartFile(destination, path, server, fd, found);
      } catch (error) {
        letGo(destination, fd);
        throw error;
      }
      letGo(destination, fd);
      return new PartFile(destination, path, server, openLocked(destination), undefined);
    } catch (error) {
      throw asLocal(error, destination);
    }
  }

  /** Removes what an earlier download left beside a file that is whole. */
  static clear(destination: string): void {
    try {
      const fd = openLocked(destination);
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
    this.#queue = this.#queueFrom(found?.bytes ?? 0, found?.crc32 ?? 0);
  }

  get etag(): string {
    return this.#meta?.etag ?? "";
  }

  get bytes(): number {
    return this.#queue.bytes;
  }

  begin(meta: Meta): void {
    this.#meta = meta;
    this.#save();
  }

  async append(chunk: Uint8Array, crc32: number, free: Release): Promise<void> {
    await this.#queue.append(chunk, crc32, free);
    const due = this.bytes - this.#savedBytes >= SAVE_BYTES || performance.now() - this.#savedAt >= SAVE_MS;
    if (due && this.bytes > this.#savedBytes) this.#save();
  }

  async settle(): Promise<void> {
    try {
      await this.#queue.settle();
    } catch (error) {
      // What no log counts is of no use; on a full disk it is the room that the log needs.
      ftruncateSync(this.#fd, this.bytes);
      this.#saveIfNew();
      throw error;
    }
    this.#saveIfNew();
  }

  reset(): void {
    removeIfThere(this.destination + LOG_SUFFIX);
    this.#meta = undefined;
    this.#queue = this.#queueFrom(0, 0);
    this.#savedBytes = -1;
  }

  /** The whole file is there: checks the size, syncs, sets the time, and gives it its name. Throws `local`. */
  async finish(): Promise<void> {
    await this.settle();
    const meta = this.#meta!;
    try {
      ftruncateSync(this.#fd, meta.size);
      setTime(this.#fd, meta.mtime);
      this.#sync();
      if (!isStill(this.destination + PART_SUFFIX, this.#fd)) {
        throw local(`cannot finish ${quote(this.destination)}: something else took the name of its part; get it again`);
      }
      renameSync(this.destination + PART_SUFFIX, this.destination);
      removeIfThere(this.destination + LOG_SUFFIX);
      syncFolder(dirname(this.destination));
    } catch (error) {
      throw asLocal(error, this.destination);
    }
  }

  /** After a failed fsync the system may show content that the disk does not have: such a part is not gone on with. */
  #sync(): void {
    try {
      fsyncSync(this.#fd);
    } catch (error) {
      setAside(this.destination);
      removeIfThere(this.destination + LOG_SUFFIX);
      throw error;
    }
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

  #queueFrom(bytes: number, crc32: number): WriteQueue {
    ftruncateSync(this.#fd, bytes);
    return new WriteQueue(this.#fd, this.destination, { seekable: true, bytes, crc32 });
  }

  #saveIfNew(): void {
    if (this.#meta && this.bytes !== this.#savedBytes) this.#save();
  }

  #save(): void {
    const { etag, size, mtime } = this.#meta!;
    const { bytes, crc32 } = this.#queue;
    const log: ResumeLog = { command: "get", path: this.#path, server: this.#server, etag, size, mtime, bytes, crc32 };
    const name = this.destination + LOG_SUFFIX;
    try {
      writeFileSync(this.destination + NEW_LOG_SUFFIX, `${JSON.stringify(log)}\n`);
      renameSync(this.destination + NEW_LOG_SUFFIX, name);
    } catch (error) {
      throw asLocal(error, this.destination);
    }
    this.#savedBytes = bytes;
    this.#savedAt = performance.now();
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
    const texts = [log.path, log.server, log.etag].every((value) => typeof value === "string" && value !== "");
    const counts = [log.size, log.bytes, log.crc32].every((value) => Number.isSafeInteger(value) && value >= 0);
    const fits = log.bytes <= log.size && Number.isSafeInteger(log.mtime);
    if (log.command === "get" && texts && counts && fits) return log;
  } catch {
    // Falls through to the same words: not JSON, or JSON of another kind.
  }
  return `the resume log ${quote(basename(name))} is damaged`;
}

/** The log to go on by, or none; "aside" after a part that does not fit was put away. `note` is told why. */
function takeUp(
  destination: string,
  path: string,
  fd: number,
  note: (text: string) => void,
): ResumeLog | "aside" | undefined {
  const { size } = fstatSync(fd);
  if (size === 0 && !existsSync(destination + LOG_SUFFIX)) return undefined;
  const found = recall(destination, path, fd, size);
  if (typeof found === "object") return found;
  const aside = size > 0 ? setAside(destination) : undefined;
  note(`${found}; starting again${aside ? `, and the old part is kept as ${quote(aside)}` : ""}`);
  removeIfThere(destination + LOG_SUFFIX);
  return aside ? "aside" : undefined;
}

/** What the log and the part say together: where to go on, or what is wrong. */
function recall(destination: string, path: string, fd: number, size: number): ResumeLog | string {
  const log = readLog(destination + LOG_SUFFIX);
  const name = quote(basename(destination + PART_SUFFIX));
  if (log === undefined) return `${name} has no resume log`;
  if (typeof log === "string") return log;
  if (log.path !== path) return `${name} is a part of another file, ${quote(log.path)}`;
  if (size < log.bytes) return `${name} is shorter than its resume log says, ${size} bytes instead of ${log.bytes}`;
  if (crc32OfFile(fd, log.bytes) !== log.crc32) return `${name} was damaged since it was written`;
  return log;
}

function crc32OfFile(fd: number, bytes: number): number {
  const buffer = new Uint8Array(1024 * 1024);
  let crc32 = 0;
  for (let at = 0; at < bytes; ) {
    const count = readSync(fd, buffer, 0, Math.min(buffer.length, bytes - at), at);
    if (count === 0) return -1;
    crc32 = Bun.hash.crc32(buffer.subarray(0, count), crc32);
    at += count;
  }
  return crc32;
}

function setAside(destination: string): string {
  for (let number = 1; ; number++) {
    const aside = `${destination}.aside-${number}${PART_SUFFIX}`;
    if (existsSync(aside)) continue;
    renameSync(destination + PART_SUFFIX, aside);
    return aside;
  }
}

/**
 * Opens the part with its lock: flock(2) on the part itself, which goes with its process, however that ends; without
 * flock, a file beside it with the number of the process that holds it.
 */
function openLocked(destination: string): number {
  const name = destination + PART_SUFFIX;
  for (;;) {
    const fd = openSync(
      name,
      constants.O_RDWR | constants.O_CREAT | constants.O_NOFOLLOW | constants.O_NONBLOCK,
      0o666,
    );
    const holder = fstatSync(fd).isFile() ? lock(fd, destination) : "something that is no file";
    if (holder === undefined && isStill(name, fd)) return fd;
    closeSync(fd);
    if (holder !== undefined) {
      throw local(`${quote(destination)} is being written by ${holder}; wait for it, or choose another name`);
    }
    // The one before us finished between our open and our lock: what we hold has become the finished file.
  }
}

/** Undefined when the lock is ours, else who holds it. */
function lock(fd: number, destination: string): string | undefined {
  const calls = libc();
  if (calls) return calls.lock(fd) === -Errno.EAGAIN ? holderOf(fd) : undefined;
  const name = destination + LOCK_SUFFIX;
  try {
    writeFileSync(name, String(process.pid), { flag: "wx" });
    return undefined;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
  }
  const holder = Number(readFileSync(name, "utf8"));
  if (holder > 0 && isRunning(holder)) return `process ${holder}`;
  removeIfThere(name);
  return lock(fd, destination);
}

function letGo(destination: string, fd: number): void {
  if (!libc()) removeIfThere(destination + LOCK_SUFFIX);
  closeSync(fd);
}

function isRunning(pid: number): boolean {
  try {
    return process.kill(pid, 0);
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EPERM";
  }
}

function isStill(name: string, fd: number): boolean {
  try {
    const [there, ours] = [lstatSync(name), fstatSync(fd)];
    return there.ino === ours.ino && there.dev === ours.dev;
  } catch {
    return false;
  }
}

/** From /proc/locks: `1: FLOCK ADVISORY WRITE 4711 08:01:1234 0 EOF`. */
function holderOf(fd: number): string {
  const inode = `:${fstatSync(fd).ino}`;
  try {
    const line = readFileSync("/proc/locks", "utf8")
      .split("\n")
      .find((text) => text.split(/\s+/)[5]?.endsWith(inode));
    const pid = line?.split(/\s+/)[4];
    return pid ? `process ${pid}` : "another process";
  } catch {
    return "another process";
  }
}

/** A served file must not pass for a log or a part of ours: the next start would believe it. */
function checkDestination(destination: string): void {
  const own = [PART_SUFFIX, LOG_SUFFIX, LOCK_SUFFIX, NEW_LOG_SUFFIX].find((suffix) => destination.endsWith(suffix));
  if (own)
    throw local(`cannot write ${quote(destination)}: names in ${own} are for unfinished downloads; choose one with -o`);
  if (statSync(destination, { throwIfNoEntry: false })?.isDirectory()) {
    throw local(`${quote(destination)} is a folder; use -d to put files into it`);
  }
}

/** Microseconds since 1970. Bun takes a number below zero for the present, but not a Date. */
function setTime(fd: number, mtime: number): void {
  // A quarter of a microsecond more, so that what a double loses does not make it the microsecond before.
  const time = mtime < 0 ? new Date(mtime / 1000) : (mtime + 0.25) / 1e6;
  futimesSync(fd, time, time);
}

function syncFolder(path: string): void {
  const fd = openSync(path, constants.O_RDONLY);
  try {
    fsyncSync(fd);
  } finally {
    closeSync(fd);
  }
}

function removeIfThere(name: string): void {
  try {
    unlinkSync(name);
  } catch (error) {
    // A name too long for a log has none.
    if (!["ENOENT", "ENAMETOOLONG"].includes((error as NodeJS.ErrnoException).code ?? "")) throw error;
  }
}

// ---------------------------------------------------------------------------------------------------- stream

/** A descriptor that takes bytes once: standard output, a pipe, a device. Only this process can go on with it. */
export class StreamTarget implements Target {
  readonly restartable = false;
  readonly #queue: WriteQueue;
  #etag = "";

  constructor(fd: number, name: string) {
    this.#queue = new WriteQueue(fd, name, { seekable: false });
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

// ---------------------------------------------------------------------------------------------------- writing

/** A second descriptor for a pipe or device, ours alone, that does not block; undefined where that can't be had. */
function openEager(fd: number): number | undefined {
  const stat = fstatSync(fd);
  if (!stat.isFIFO() && !stat.isCharacterDevice()) return undefined;
  try {
    return openSync(`/proc/self/fd/${fd}`, constants.O_WRONLY | constants.O_NONBLOCK);
  } catch {
    return undefined;
  }
}

async function writeAll(fd: number, chunks: Uint8Array[], position: number | null, name: string): Promise<void> {
  for (let rest = chunks; rest.length > 0; ) {
    const count = await writeSome(fd, rest, position, name);
    // A pipe that some other process has set to not block, and that is full.
    if (count === 0) await Bun.sleep(5);
    if (position !== null) position += count;
    rest = withoutFirst(rest, count);
  }
}

function writeSome(fd: number, chunks: Uint8Array[], position: number | null, name: string): Promise<number> {
  return new Promise((resolve, reject) => {
    writev(fd, chunks, position, (error, count) => {
      if (!error) resolve(count);
      else if (error.code === "EAGAIN") resolve(0);
      else reject(asLocal(error, name));
    });
  });
}

function withoutFirst(chunks: Uint8Array[], count: number): Uint8Array[] {
  let index = 0;
  while (index < chunks.length && count >= chunks[index]!.length) count -= chunks[index++]!.length;
  const rest = chunks.slice(index);
  if (rest[0] && count > 0) rest[0] = rest[0].subarray(count);
  return rest;
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
  const { code, message } = error as NodeJS.ErrnoException;
  // The reader of our output went away: no failure of ours, and nobody is left to tell.
  if (code === "EPIPE") return new RepriseError("pipe_closed", undefined, error);
  return new RepriseError("local", `cannot write ${quote(name)}: ${LOCAL_REASONS[code ?? ""] ?? message}`, error);
}

function local(text: string): RepriseError {
  return new RepriseError("local", text);
}
