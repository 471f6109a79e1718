/**
 * Writing to a local disk with care, for both sides: chunks in their order, locks between processes, times to the
 * microsecond, and many files synced together.
 */
import {
  closeSync,
  constants,
  fstatSync,
  fsync,
  futimesSync,
  lstatSync,
  openSync,
  read,
  readFileSync,
  readlinkSync,
  readSync,
  statfsSync,
  symlinkSync,
  unlinkSync,
  writeSync,
  writev,
} from "node:fs";
import { Errno, libc } from "./libc.ts";
import { crc32Combine } from "./protocol.ts";

/** Bytes that wait for the write before theirs: what is received beside it and then goes out in one. */
const MAX_WAITING_BYTES = 1024 * 1024;
/** Up to here a write into the page cache costs less than handing it to a thread. */
const MAX_EAGER_BYTES = 64 * 1024;
const SUM_BUFFER_BYTES = 1024 * 1024;
/** f_type of file systems that are memory alone, where a sync does nothing: tmpfs, ramfs. */
const MEMORY_FILE_SYSTEMS = [0x01021994, 0x858458f6];

// ---------------------------------------------------------------------------------------------------- writing

/** Takes back the memory of a chunk that is written. */
export type Release = (chunk: Uint8Array) => void;

export interface WriteQueueOptions {
  seekable: boolean;
  wrap: (error: unknown) => unknown;
  bytes?: number;
  crc32?: number;
}

/**
 * Chunks on their way to a descriptor: one write at a time, of all that waits, beside the receiving of further chunks.
 * They count once they are written. Positions are given, or none for what takes bytes in their order.
 */
export class WriteQueue {
  readonly #fd: number;
  readonly #wrap: (error: unknown) => unknown;
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

  /** `wrap` makes of a system error what is thrown. */
  constructor(fd: number, options: WriteQueueOptions) {
    this.#fd = fd;
    this.#wrap = options.wrap;
    this.#seekable = options.seekable;
    this.#eager = options.seekable ? undefined : openEager(fd);
    this.bytes = options.bytes ?? 0;
    this.crc32 = options.crc32 ?? 0;
  }

  /** Takes the chunk over. Waits, and so holds up the sender, while enough is waiting for one write. */
  async append(chunk: Uint8Array, crc32: number, free: Release): Promise<void> {
    // After a failure nothing more is taken: it would stand where the lost chunk belongs.
    if (this.#failure) throw this.#failure;
    const eager = this.#writing ? 0 : this.#writeEagerly(chunk, crc32);
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

  /** What a pipe takes at once, or the page cache when it is little, needs no thread; returns how much that was. */
  #writeEagerly(chunk: Uint8Array, crc32: number): number {
    const fd = this.#seekable ? this.#fd : this.#eager;
    if (fd === undefined || (this.#seekable && chunk.length > MAX_EAGER_BYTES)) return 0;
    try {
      const count = writeSync(fd, chunk, 0, chunk.length, this.#seekable ? this.bytes : null);
      // Less than all: the next write says why.
      if (this.#seekable && count < chunk.length) return 0;
      this.#count(count, crc32);
      return count;
    } catch (error) {
      if (!this.#seekable && (error as NodeJS.ErrnoException).code === "EAGAIN") return 0;
      this.#failure = this.#wrap(error);
      throw this.#failure;
    }
  }

  #count(length: number, crc32: number): void {
    this.bytes += length;
    if (this.#seekable) this.crc32 = crc32Combine(this.crc32, crc32, length);
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
      );
      for (const { chunk, crc32 } of batch) this.#count(chunk.length, crc32);
    } catch (error) {
      this.#failure = this.#wrap(error);
      this.#waiting = [];
      this.#waitingBytes = 0;
    }
    for (const { chunk, free } of batch) free(chunk);
    this.#writing = this.#waiting.length > 0 ? this.#writeWaiting() : undefined;
  }
}

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

/** All of them, in their order, from `position` on; null for what takes bytes as they come. */
export async function writeAll(fd: number, chunks: Uint8Array[], position: number | null): Promise<void> {
  for (let rest = chunks; rest.length > 0; ) {
    const count = await writeSome(fd, rest, position);
    // A pipe that some other process has set to not block, and that is full.
    if (count === 0) await Bun.sleep(5);
    if (position !== null) position += count;
    rest = withoutFirst(rest, count);
  }
}

function writeSome(fd: number, chunks: Uint8Array[], position: number | null): Promise<number> {
  return new Promise((resolve, reject) => {
    writev(fd, chunks, position, (error, count) => {
      if (!error) resolve(count);
      else if (error.code === "EAGAIN") resolve(0);
      else reject(error);
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

// ---------------------------------------------------------------------------------------------------- locks

/** Some other process, or another part of this one, has the lock. */
export class Held extends Error {
  readonly holder: string;
  constructor(path: string, holder: string) {
    super(`${path} is held by ${holder}`);
    this.holder = holder;
  }
}

/** Opens a file to write, made if it is not there, with its lock. Throws `Held`, and system errors. */
export function openLocked(path: string, mode = 0o666): number {
  for (;;) {
    const flags = constants.O_RDWR | constants.O_CREAT | constants.O_NOFOLLOW | constants.O_NONBLOCK;
    const fd = openSync(path, flags, mode);
    try {
      if (!fstatSync(fd).isFile()) throw new Held(path, "something that is no file");
      if (!tryLock(fd, path)) throw new Held(path, holderOf(fd, path));
    } catch (error) {
      closeSync(fd);
      throw error;
    }
    if (isStill(path, fd)) return fd;
    // The one before us finished between our open and our lock: what we hold has got another name, or none.
    unlock(fd, path);
    closeSync(fd);
  }
}

/**
 * Locks the open file `path` for whoever opened it: flock(2), which goes with its process, however that ends; without it
 * a link `PATH.lock` to the number of the process, which is made whole or not at all. False when somebody else has the lock.
 */
export function tryLock(fd: number, path: string): boolean {
  const calls = libc();
  if (calls) return calls.lock(fd) !== -Errno.EAGAIN;
  const name = `${path}.lock`;
  try {
    symlinkSync(String(process.pid), name);
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EEXIST") throw error;
  }
  const holder = lockHolder(path);
  if (holder !== undefined && isRunning(holder)) return false;
  if (holder !== undefined) removeIfThere(name);
  return tryLock(fd, path);
}

/** The process that a `PATH.lock` names; undefined if it has just let go. */
function lockHolder(path: string): number | undefined {
  try {
    return Number(readlinkSync(`${path}.lock`));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}

export function unlock(fd: number, path: string): void {
  const calls = libc();
  if (calls) calls.unlock(fd);
  else removeIfThere(`${path}.lock`);
}

export function isRunning(pid: number): boolean {
  try {
    return pid > 0 && process.kill(pid, 0);
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EPERM";
  }
}

/** Whether the open file still has the name. */
export function isStill(name: string, fd: number): boolean {
  try {
    const [there, ours] = [lstatSync(name), fstatSync(fd)];
    return there.ino === ours.ino && there.dev === ours.dev;
  } catch {
    return false;
  }
}

/** From `PATH.lock`, or /proc/locks: `1: FLOCK ADVISORY WRITE 4711 08:01:1234 0 EOF`. */
function holderOf(fd: number, path: string): string {
  const inode = `:${fstatSync(fd).ino}`;
  try {
    if (!libc()) return `process ${lockHolder(path) ?? "that has just ended"}`;
    const line = readFileSync("/proc/locks", "utf8")
      .split("\n")
      .find((text) => text.split(/\s+/)[5]?.endsWith(inode));
    const pid = line?.split(/\s+/)[4];
    return pid ? `process ${pid}` : "another process";
  } catch {
    return "another process";
  }
}

// ---------------------------------------------------------------------------------------------------- files

/**
 * Microseconds since 1970. Bun takes a number below zero for the present, and cuts a Date to the millisecond, but reads a
 * text as it is.
 */
export function setTime(fd: number, mtime: number): void {
  // A part of a microsecond more, away from zero, so that what a double loses does not make it the one beside.
  const time = mtime < 0 ? String((mtime - 0.5) / 1e6) : (mtime + 0.25) / 1e6;
  futimesSync(fd, time, time);
}

/** Whether the file lies in memory alone, so that there is nothing to sync and no disk to wait for. */
export function isInMemory(fd: number): boolean {
  return MEMORY_FILE_SYSTEMS.includes(statfsSync(`/proc/self/fd/${fd}`).type);
}

/** What has come to each: undefined for a file or folder that is on disk now, an error for another. */
export async function syncTogether(fds: number[]): Promise<unknown[]> {
  // All are on their way before the first is waited for, and then share the journal's commits.
  if (fds.length > 1) for (const fd of fds) libc()?.startWriting(fd);
  const results = await Promise.allSettled(fds.map(sync));
  return results.map((result) => (result.status === "rejected" ? result.reason : undefined));
}

async function sync(fd: number): Promise<void> {
  const error = await new Promise<NodeJS.ErrnoException | null>((resolve) => fsync(fd, resolve));
  // Only put off: some file systems, of networks for the most part, let a signal interrupt it.
  if (error?.code === "EINTR") return sync(fd);
  if (error) throw error;
}

export async function syncFolder(path: string): Promise<void> {
  const fd = openSync(path, constants.O_RDONLY | constants.O_DIRECTORY);
  try {
    if (!isInMemory(fd)) await sync(fd);
  } finally {
    closeSync(fd);
  }
}

export function removeIfThere(name: string): void {
  try {
    unlinkSync(name);
  } catch (error) {
    // A name too long for a log has none, and what is not there need not be writable.
    const isGone = ["ENOENT", "ENAMETOOLONG", "ENOTDIR"].includes((error as NodeJS.ErrnoException).code ?? "");
    if (!isGone && lstatSync(name, { throwIfNoEntry: false })) throw error;
  }
}

/**
 * Reads `bytes` at `offset`; fewer where the file ends. From memory at once, else by Bun's thread pool, so that a slow
 * disk holds up nobody else. `inMemory`: it is known that there is no disk.
 */
export async function readFully(fd: number, bytes: Uint8Array, offset: number, inMemory = false): Promise<number> {
  let have = readCached(fd, bytes, offset, inMemory);
  while (have < bytes.length) {
    const count = await readSome(fd, bytes.subarray(have), offset + have);
    if (count === 0) break;
    have += count;
  }
  return have;
}

/** What the page cache has of it, without waiting for a disk. */
export function readCached(fd: number, bytes: Uint8Array, offset: number, inMemory = false): number {
  if (bytes.length === 0) return 0;
  if (inMemory) return readSync(fd, bytes, 0, bytes.length, offset);
  const calls = libc();
  if (!calls) return 0;
  const count = calls.readCached(fd, bytes, offset);
  // tmpfs does not know how not to wait, and never waits.
  if (count === -Errno.EOPNOTSUPP && isInMemory(fd)) return readSync(fd, bytes, 0, bytes.length, offset);
  return Math.max(0, count);
}

/** One read, in Bun's thread pool: how many bytes came, 0 at the end. */
export function readSome(fd: number, bytes: Uint8Array, offset: number | null): Promise<number> {
  return new Promise((resolve, reject) => {
    read(fd, bytes, 0, bytes.length, offset, (error, count) => (error ? reject(error) : resolve(count)));
  });
}

/** The crc32 of `length` bytes at `offset`; undefined where the file ends before. */
export async function crc32Of(fd: number, offset: number, length: number): Promise<number | undefined> {
  const buffer = new Uint8Array(Math.min(length, SUM_BUFFER_BYTES));
  let crc32 = 0;
  for (let at = 0; at < length; at += buffer.length) {
    const piece = buffer.subarray(0, Math.min(buffer.length, length - at));
    if ((await readFully(fd, piece, offset + at)) < piece.length) return undefined;
    crc32 = Bun.hash.crc32(piece, crc32);
  }
  return crc32;
}
