/**
 * One file in either direction, as the commands do it: whole or resumed, with its log, its progress line and what is
 * printed of it.
 */
import { closeSync, mkdirSync, open, readdirSync, rmdirSync, type Stats, statSync, writeFileSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import { formatSize, isoTime, print, printable, say, showsProgress, usage } from "./command.ts";
import { type Context, forEach, interruption, isInterruption } from "./context.ts";
import { Held, openLocked, removeIfThere, unlock } from "./disk.ts";
import { type Entry, MAX_CONTENT_BYTES, type Meta, quote, RepriseError, splitPath, toJson } from "./protocol.ts";
import type { DownloadHooks, Remote } from "./remote.ts";
import {
  asLocal,
  FOLDER_LOG_SUFFIX,
  isUnfinished,
  LOCK_SUFFIX,
  LOG_SUFFIX,
  MAX_SEGMENTS,
  PART_SUFFIX,
  PartFile,
  type ResumeLog,
  readLog,
  StreamTarget,
  type Target,
  writeLog,
} from "./resume.ts";
import type { FileSource } from "./source.ts";
import type { PutOptions } from "./upload.ts";

/** An upload's log is written again after so many bytes or milliseconds. */
const SAVE_BYTES = 16 * 1024 * 1024;
const SAVE_MS = 50;
/** A segment is worth a connection from this size on. */
const MIN_SEGMENT_BYTES = 1024 * 1024;

// ---------------------------------------------------------------------------------------------------- get

export async function getOne(context: Context, path: string, file: string, segments = 1): Promise<void> {
  // What the server would refuse makes no file here.
  if (splitPath(path).length === 0)
    throw new RepriseError("not_a_file", "not a file: the served folder itself; use -r");
  if (file === "-") return getStream(context, path, 1, "standard output");
  const descriptor = descriptorOf(file);
  if (descriptor !== undefined) return getStream(context, path, descriptor, file);
  const found = lookAt(file);
  if (found && !found.isFile() && !found.isDirectory()) return getDevice(context, path, file);
  const started = performance.now();
  const done = (meta: Meta, offset: number) => printDone(context, { path, file, ...meta, offset, started });
  const complete = found?.isFile() ? await ifComplete(context.remote, path, file) : undefined;
  if (complete) return done(complete, complete.size);
  const part = await PartFile.open(file, path, context.server, (text) => say("warn", text));
  try {
    const { meta, offset } =
      segments > 1 || part.segments.length > 1
        ? await getSegments(context, path, part, segments)
        : await getWhole(context, path, part.segments[0]!, () => part.finish());
    await done(meta, offset);
  } catch (error) {
    if (part.bytes === 0) part.discard();
    if (error instanceof RepriseError && error.code === "not_a_file") {
      throw new RepriseError(error.code, `${error.message}; -r takes all that is in it`, error);
    }
    throw resumable(error);
  } finally {
    part.close();
  }
}

/** An interruption says how to go on. */
export function resumable(error: unknown): unknown {
  if (!isInterruption(error)) return error;
  return new RepriseError(error.code, `${error.code}; the same command goes on from here`);
}

/** `path file size mtime etag offset ms`: contract for `get --json` and `put --json`. */
export async function printDone(
  context: Context,
  done: Meta & { path: string; file: string; offset: number; started: number },
): Promise<void> {
  if (!context.json) return;
  const { path, file, size, mtime, etag, offset } = done;
  const ms = Math.round(performance.now() - done.started);
  await print(toJson({ path, file, size, mtime: isoTime(mtime), etag, offset, ms }));
}

/** Undefined for what is not there, or cannot be: making it says why. */
export function lookAt(file: string): Stats | undefined {
  try {
    return statSync(file);
  } catch {
    return undefined;
  }
}

/** A name of one of our own descriptors: what is open there is meant, not what it is called. */
function descriptorOf(file: string): number | undefined {
  if (file === "/dev/stdout") return 1;
  if (file === "/dev/stderr") return 2;
  const number = /^\/(?:dev|proc\/self)\/fd\/(\d+)$/.exec(file)?.[1];
  return number === undefined ? undefined : Number(number);
}

async function getDevice(context: Context, path: string, file: string): Promise<void> {
  const fd = await openForWriting(file);
  try {
    await getStream(context, path, fd, file);
  } finally {
    closeSync(fd);
  }
}

/** Beside the event loop: a pipe is opened when somebody opens its other end, which may be never. */
function openForWriting(file: string): Promise<number> {
  return new Promise((resolve, reject) => {
    open(file, "w", (error, fd) => (error ? reject(asLocal(error, file)) : resolve(fd)));
    interruption.signal.addEventListener("abort", () => reject(interruption.signal.reason), { once: true });
  });
}

async function getStream(context: Context, path: string, fd: number, name: string): Promise<void> {
  const target = new StreamTarget(fd, name);
  try {
    await getWhole(context, path, target, async () => {});
  } catch (error) {
    const isCut = error instanceof RepriseError && error.code === "changed" && target.bytes > 0;
    if (!isCut) throw error;
    throw new RepriseError("changed", `${error.message} after ${target.bytes} bytes were given out; get it again`);
  } finally {
    target.close();
  }
}

/** A download with its progress line. */
async function getWhole(
  context: Context,
  path: string,
  target: Target,
  finish: () => Promise<void>,
): Promise<{ meta: Meta; offset: number }> {
  const start = { offset: Number.POSITIVE_INFINITY };
  const meta = await withProgress(basename(path), async (hooks, doing) => {
    const meta = await context.remote.download(path, target, {
      ...hooks,
      begin(meta, offset) {
        // Where an attempt goes on is no news, unless it is further back: then all was started again.
        if (offset >= start.offset) return;
        start.offset = offset;
        hooks.begin(meta, offset);
      },
    });
    doing("writing to disk");
    await finish();
    return meta;
  });
  return { meta, offset: start.offset };
}

/** Ranges of one file over several connections, into one part. All are of one version, or it starts again. */
async function getSegments(
  context: Context,
  path: string,
  part: PartFile,
  count: number,
): Promise<{ meta: Meta; offset: number }> {
  for (let restarts = 0; ; restarts++) {
    try {
      return await withProgress(basename(path), async (hooks, doing) => {
        const meta = await context.remote.stat(path);
        if (meta.kind !== "file") throw new RepriseError("not_a_file", `not a file: ${quote(path)} is a folder`);
        if (part.etag !== "" && part.etag !== meta.etag)
          throw new RepriseError("changed", `changed on the server: ${quote(path)}`);
        const missing = meta.size - part.bytes;
        part.split(meta, Math.max(1, Math.min(count, MAX_SEGMENTS, Math.floor(missing / MIN_SEGMENT_BYTES))));
        const offset = part.bytes;
        hooks.begin(meta, offset);
        await receiveSegments(context, path, part, () => hooks.progress(part.bytes));
        doing("writing to disk");
        await part.finish();
        return { meta, offset };
      });
    } catch (error) {
      const isChange = error instanceof RepriseError && error.code === "changed";
      if (!isChange || restarts >= context.remote.retries) throw error;
      say("warn", `${error.message}; starting again`);
      part.reset();
    }
  }
}

async function receiveSegments(context: Context, path: string, part: PartFile, progress: () => void): Promise<void> {
  const missing = part.segments.filter((segment) => segment.bytes < (segment.end ?? Number.POSITIVE_INFINITY));
  const remotes = missing.map(() => context.connectTo(context.server));
  try {
    let first: unknown;
    await Promise.allSettled(
      missing.map(async (segment, index) => {
        try {
          await remotes[index]!.download(path, segment, { progress });
        } catch (error) {
          first ??= error;
          // One that cannot go on ends all; what the others hold is in the log.
          for (const remote of remotes) remote.giveUp();
        }
      }),
    );
    if (first) throw first;
  } finally {
    for (const remote of remotes) remote.close();
  }
}

interface ProgressHooks extends DownloadHooks {
  begin(meta: Pick<Meta, "size">, offset: number): void;
  progress(bytes: number): void;
}

/** Runs `work` with a progress line for what it tells, where one is shown. */
async function withProgress<T>(
  name: string,
  work: (hooks: ProgressHooks, doing: (what: string) => void) => Promise<T>,
): Promise<T> {
  const line = showsProgress() ? new (await import("./terminal.ts")).ProgressLine(name) : undefined;
  let done = false;
  const hooks = {
    begin: ({ size }: Pick<Meta, "size">, offset: number) => line?.begin(offset, size),
    progress: (bytes: number) => line?.update(bytes),
  };
  try {
    const result = await work(hooks, (what) => line?.doing(what));
    done = true;
    return result;
  } finally {
    line?.end(done);
  }
}

/** What the server has, if the local file is that, by size and time: then nothing is sent. */
async function ifComplete(remote: Remote, path: string, file: string): Promise<Meta | undefined> {
  const meta = await remote.stat(path);
  if (meta.kind !== "file" || !isSame(localMeta(file), meta)) return undefined;
  // What an earlier download left behind is of no more use.
  if ([PART_SUFFIX, LOG_SUFFIX].some((suffix) => lookAt(file + suffix))) PartFile.clear(file);
  say("info", `${printable(file)} is complete already`);
  return meta;
}

function localMeta(file: string): { size: number; mtime: number } {
  const { size, mtimeNs } = statSync(file, { bigint: true });
  return { size: Number(size), mtime: Number(mtimeNs / 1000n) };
}

/** A time set through a double may be off by one microsecond. */
export function isSame(a: { size: number; mtime: number }, b: { size: number; mtime: number }): boolean {
  return a.size === b.size && Math.abs(a.mtime - b.mtime) <= 1;
}

// ---------------------------------------------------------------------------------------------------- put

export interface PutSettings {
  noClobber: boolean;
  etag: string;
  /** Where the log of an unfinished upload is kept. */
  directory: string;
  /** Bytes that standard input must have. */
  expected?: number | undefined;
}

/** Puts a local file, or standard input for "-", as `path`. */
export async function putOne(context: Context, file: string, path: string, settings: PutSettings): Promise<void> {
  if (splitPath(path).length === 0) throw usage("put - needs -t NAME");
  const found = file === "-" ? undefined : lookAt(file);
  const isStream = file === "-" || (found !== undefined && !found.isFile() && !found.isDirectory());
  const started = performance.now();
  if (isStream) return putStream(context, file, path, settings, started);
  const { FileSource } = await import("./source.ts");
  const source = new FileSource(file);
  try {
    const done = (meta: Meta, offset: number) => printDone(context, { path, file, ...meta, offset, started });
    const complete = settings.etag === "" ? await ifPut(context.remote, source, path) : undefined;
    const log = new UploadLog(settings, file, path, context.server);
    if (complete) {
      log.remove();
      return done(complete, complete.size);
    }
    const { meta, offset } = await putFile(context, source, { ...settings, path }, log);
    await done(meta, offset);
  } finally {
    source.close();
  }
}

async function putStream(
  context: Context,
  file: string,
  path: string,
  settings: PutSettings,
  started: number,
): Promise<void> {
  const name = file === "-" ? "standard input" : file;
  const fd = file === "-" ? 0 : await openForReading(file);
  const { StreamSource } = await import("./source.ts");
  const source = new StreamSource(fd, name, settings.expected);
  const options = { path, id: newId(), noClobber: settings.noClobber, etag: settings.etag, parents: false };
  const meta = await withProgress(basename(path), (hooks) =>
    context.remote.upload(options, source, {
      begin: (size, offset) => hooks.begin({ size }, offset),
      progress: hooks.progress,
    }),
  );
  await printDone(context, { path, file, ...meta, offset: 0, started });
}

function openForReading(file: string): Promise<number> {
  return new Promise((resolve, reject) => {
    open(file, "r", (error, fd) => (error ? reject(asLocal(error, file)) : resolve(fd)));
    interruption.signal.addEventListener("abort", () => reject(interruption.signal.reason), { once: true });
  });
}

async function ifPut(remote: Remote, source: FileSource, path: string): Promise<Meta | undefined> {
  try {
    const meta = await remote.stat(path);
    if (meta.kind !== "file" || !isSame(source, meta)) return undefined;
    say("info", `${printable(source.name)} is on the server already`);
    return meta;
  } catch (error) {
    if (error instanceof RepriseError && error.code === "not_found") return undefined;
    throw error;
  }
}

async function putFile(
  context: Context,
  source: FileSource,
  options: Pick<PutOptions, "path" | "noClobber" | "etag">,
  log: UploadLog,
): Promise<{ meta: Meta; offset: number }> {
  // What travels in one frame is not worth a log.
  const isLogged = source.size > MAX_CONTENT_BYTES;
  const resumes = isLogged && log.resumes(source);
  let start = Number.POSITIVE_INFINITY;
  const { path, noClobber, etag } = options;
  const put = { path, noClobber, etag, parents: false, id: isLogged ? log.id : "" };
  try {
    const meta = await withProgress(basename(options.path), (hooks) =>
      context.remote.upload(
        put,
        source,
        {
          begin(size, offset, crc32) {
            if (offset < start) hooks.begin({ size }, offset);
            start = Math.min(start, offset);
            if (isLogged) log.begin(source, offset, crc32);
          },
          progress(bytes, crc32) {
            hooks.progress(bytes);
            if (isLogged) log.sent(bytes, crc32);
          },
        },
        resumes,
      ),
    );
    log.remove();
    return { meta, offset: Number.isFinite(start) ? start : meta.size };
  } catch (error) {
    if (isLogged) log.keepFor(error);
    throw resumable(error);
  }
}

/** 32 hexadecimal digits that nobody can guess: see [put]. */
export function newId(): string {
  return crypto.randomUUID().replaceAll("-", "");
}

/** Folders that were made for logs, and go with the last of them. */
const madeFolders = new Set<string>();

function makeLogs(directory: string): void {
  if (lookAt(directory)) return;
  mkdirSync(directory, { recursive: true });
  madeFolders.add(directory);
}

function tidyLogs(directory: string): void {
  if (madeFolders.has(directory) && readdirSync(directory).length === 0) rmdirSync(directory);
}

/** What is in it is of unfinished transfers: no folder of the user's, though it may be in one that is put. */
export function holdsOnlyLogs(directory: string): boolean {
  try {
    const names = readdirSync(directory);
    return names.length > 0 && names.every(isUnfinished);
  } catch {
    // Whoever looks into it next says why that cannot be done.
    return false;
  }
}

/** An upload is told from others by what it sends, and to where. */
function nameOfLog(directory: string, file: string, path: string, server: string, suffix: string): string {
  const hash = Bun.hash.xxHash64(`${resolve(file)}\0${server}\0${path}`).toString(16);
  return join(directory, `${[...basename(file)].slice(0, 50).join("")}.${hash}${suffix}`);
}

type LogSettings = Pick<PutSettings, "directory" | "noClobber"> & Partial<Pick<PutSettings, "etag">>;

/** The JSON log of an upload, in the folder where `resume` looks for it. */
export class UploadLog {
  readonly #name: string;
  readonly #directory: string;
  #log: ResumeLog;
  #lock: number | undefined;
  #savedBytes = 0;
  #savedAt = 0;

  constructor({ directory, noClobber, etag = "" }: LogSettings, file: string, path: string, server: string) {
    this.#directory = directory;
    this.#name = nameOfLog(directory, file, path, server, `.put${LOG_SUFFIX}`);
    this.#log = {
      command: "put",
      path,
      server,
      file: resolve(file),
      id: newId(),
      etag: "",
      size: 0,
      mtime: 0,
      bytes: 0,
      crc32: 0,
      noClobber: noClobber || undefined,
      ifEtag: etag || undefined,
    };
  }

  get id(): string {
    return this.#log.id!;
  }

  /**
   * Whether an earlier attempt sent some of what the source is now; its id is then used again. From now on no other
   * process may do the same. Throws `local`.
   */
  resumes(source: FileSource): boolean {
    this.#takeLock();
    const log = readLog(this.#name);
    if (log === undefined) return false;
    const isOurs = typeof log === "object" && log.command === "put" && log.etag === source.etag;
    const problem = isOurs ? "" : typeof log === "string" ? log : `${quote(source.name)} has changed`;
    if (problem !== "") say("warn", `${problem}; starting again`);
    if (problem !== "" || typeof log === "string") return false;
    const { noClobber, ifEtag } = this.#log;
    this.#log = { ...log, noClobber, ifEtag };
    return true;
  }

  begin(source: FileSource, bytes: number, crc32: number): void {
    const { etag, size, mtime } = source;
    this.#log = { ...this.#log, etag, size, mtime, bytes, crc32 };
    this.#save();
  }

  sent(bytes: number, crc32: number): void {
    this.#log = { ...this.#log, bytes, crc32 };
    if (bytes - this.#savedBytes >= SAVE_BYTES || performance.now() - this.#savedAt >= SAVE_MS) this.#save();
  }

  /** After a failure: what cannot be gone on with leaves no log. */
  keepFor(error: unknown): void {
    const isFinal = error instanceof RepriseError && FINAL.has(error.code);
    if (isFinal) this.remove();
    else if (this.#savedAt > 0) this.#save();
    this.#letGo();
  }

  remove(): void {
    removeIfThere(this.#name);
    // A killed process has left its lock behind, or another is at work.
    if (this.#lock === undefined && lookAt(this.#name + LOCK_SUFFIX)) this.#lock = lockOf(this.#name);
    this.#letGo();
    tidyLogs(this.#directory);
  }

  #takeLock(): void {
    try {
      makeLogs(this.#directory);
      this.#lock ??= openLocked(this.#name + LOCK_SUFFIX);
    } catch (error) {
      const file = quote(this.#log.file!);
      const why =
        error instanceof Held
          ? `it is being sent by ${error.holder}`
          : `no resume log can be kept in ${quote(this.#directory)} (${(error as NodeJS.ErrnoException).code}); choose another folder with -d`;
      throw new RepriseError("local", `cannot send ${file}: ${why}`, error);
    }
  }

  #letGo(): void {
    if (this.#lock === undefined) return;
    removeIfThere(this.#name + LOCK_SUFFIX);
    unlock(this.#lock, this.#name + LOCK_SUFFIX);
    closeSync(this.#lock);
    this.#lock = undefined;
  }

  #save(): void {
    writeLog(this.#name, this.#log);
    this.#savedBytes = this.#log.bytes;
    this.#savedAt = performance.now();
  }
}

/**
 * Stands, until a folder is on the server, for its having been put under a name that was free: whoever types the same
 * command again after an interruption finds a folder of that name there, and does not mean to put another into it.
 */
export class FolderLog {
  readonly #name: string;
  readonly #directory: string;
  readonly #log: { command: "put -r"; path: string; server: string; file: string };

  constructor(directory: string, file: string, path: string, server: string) {
    this.#directory = directory;
    this.#name = nameOfLog(directory, file, path, server, FOLDER_LOG_SUFFIX);
    this.#log = { command: "put -r", path, server, file: resolve(file) };
  }

  get isThere(): boolean {
    return lookAt(this.#name) !== undefined;
  }

  /** Runs `work` with the log there, if it can be kept, and leaves it if something of the folder may have come. */
  async around<T>(work: () => Promise<T>): Promise<T> {
    this.#write();
    try {
      const result = await work();
      this.#remove();
      return result;
    } catch (error) {
      if (error instanceof RepriseError && NOTHING_DONE.has(error.code)) this.#remove();
      throw error;
    }
  }

  #write(): void {
    try {
      makeLogs(this.#directory);
      writeFileSync(this.#name, `${JSON.stringify(this.#log)}\n`);
    } catch (error) {
      const code = (error as NodeJS.ErrnoException).code;
      const { file, path } = this.#log;
      const then = `if this is interrupted, go on with sync --up ${quote(path)} ${quote(file)}`;
      say("warn", `no log can be kept in ${quote(this.#directory)} (${code}); ${then}`);
    }
  }

  #remove(): void {
    removeIfThere(this.#name);
    tidyLogs(this.#directory);
  }
}

/** Errors that a server gives to all of a command. */
const NOTHING_DONE: ReadonlySet<string> = new Set(["read_only", "denied"]);

function lockOf(log: string): number | undefined {
  try {
    return openLocked(log + LOCK_SUFFIX);
  } catch (error) {
    if (error instanceof Held) return undefined;
    throw asLocal(error, log);
  }
}

/** Errors after which sending more would not help. */
const FINAL: ReadonlySet<string> = new Set([
  "not_found",
  "bad_name",
  "not_a_file",
  "not_a_folder",
  "refused",
  "changed",
  "exists",
  "read_only",
  "too_large",
]);

// ---------------------------------------------------------------------------------------------------- resume

/** Goes on with every transfer that has a log under `directory`; returns how many there were. */
export async function resumeAll(context: Context, directory: string): Promise<number> {
  const logs = await findLogs(directory);
  await forEach(logs, async (name) => {
    const log = readLog(name);
    if (log === undefined) return;
    const file = name.slice(0, -LOG_SUFFIX.length);
    if (typeof log === "string") throw new RepriseError("local", `${log}; remove it, and start that transfer again`);
    const server = context.isNamed ? context.server : log.server;
    const remote = context.connectTo(server);
    try {
      await resumeOne({ ...context, remote, server }, log, file, directory);
    } finally {
      remote.close();
    }
  });
  return logs.length;
}

async function resumeOne(context: Context, log: ResumeLog, file: string, directory: string): Promise<void> {
  const isPut = log.command === "put";
  const where = `${isPut ? "to" : "from"} ${printable(context.server)}`;
  const held = log.bytes + (log.segments ?? []).reduce((sum, segment) => sum + segment.bytes, 0);
  const name = isPut ? log.file! : file;
  say("info", `resuming ${printable(name)} ${where} at ${formatSize(held)} of ${formatSize(log.size)}`);
  if (!isPut) return getOne(context, log.path, file, (log.segments?.length ?? 0) + 1);
  // The log is found by what it is about, and so by the server that was named first.
  const { noClobber = false, ifEtag: etag = "" } = log;
  return putOne({ ...context, server: log.server }, name, log.path, { noClobber, etag, directory });
}

async function findLogs(directory: string): Promise<string[]> {
  const isDefault = directory === "client_root";
  if (isDefault && !lookAt(directory)) return [];
  try {
    const names = await Array.fromAsync(new Bun.Glob(`**/*${LOG_SUFFIX}`).scan({ cwd: directory, dot: true }));
    return names.map((name) => join(directory, name)).sort();
  } catch (error) {
    throw new RepriseError("local", `cannot look into ${quote(directory)} for interrupted transfers`, error);
  }
}

/** `path type size mtime`: contract for `--json`. */
export function jsonEntry({ path, kind, size, mtime }: Entry): Record<string, unknown> {
  return { path, type: kind, size, mtime: isoTime(mtime) };
}
