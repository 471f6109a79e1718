/**
 * What a cache takes of its disk, and how many chunks are on their way: what all processes that share it count together,
 * what each finds by looking at all chunks, and whose turn it is. See cache.ts.
 */
import { closeSync, constants, fstatSync, mkdirSync, openSync, readSync, writeSync } from "node:fs";
import { dirname } from "node:path";
import { tryLock, unlock } from "./disk.ts";
import { errorCode } from "./storage.ts";

/** What was not written to for this long has no writer any more. */
export const STALE_MS = 10 * 60 * 1000;
/** A count takes microseconds. Who can't get at it within so many attempts, a millisecond each, does without. */
const MAX_COUNT_ATTEMPTS = 100;

export interface Count {
  bytes: number;
  files: number;
}

/**
 * What the cache takes, in a file that is changed under its lock: bytes f64, files f64, the crc32 of both. It is never too
 * little by more than what is being written: it is raised before and lowered after. What processes that were killed have
 * left in it is put right whenever all chunks are looked at.
 */
export class Usage {
  readonly #path: string;
  #fd: number | undefined;

  constructor(path: string) {
    this.#path = path;
  }

  /** Undefined, and nothing added, where that would be over `limit`, or the count is not known. Throws system errors. */
  add(more: Count, limit?: Count): Promise<Count | undefined> {
    return this.#change((now) => {
      if (!now) return undefined;
      const then = { bytes: Math.max(0, now.bytes + more.bytes), files: Math.max(0, now.files + more.files) };
      return limit && (then.bytes > limit.bytes || then.files > limit.files) ? undefined : then;
    });
  }

  /** Undefined as long as nobody has counted. */
  read(): Promise<Count | undefined> {
    return this.#change((now) => now);
  }

  /** Sets what was found, and what has been added since `before`. */
  async correct(before: Count | undefined, found: Count): Promise<void> {
    await this.#change((now) => ({
      bytes: found.bytes + (now && before ? Math.max(0, now.bytes - before.bytes) : 0),
      files: found.files + (now && before ? Math.max(0, now.files - before.files) : 0),
    }));
  }

  close(): void {
    if (this.#fd !== undefined) closeSync(this.#fd);
    this.#fd = undefined;
  }

  /** Undefined as well where others keep it locked: one of them may be stopped. */
  async #change(change: (now: Count | undefined) => Count | undefined): Promise<Count | undefined> {
    for (let attempts = 0; attempts < MAX_COUNT_ATTEMPTS; attempts++) {
      const fd = this.#open();
      if (tryLock(fd, this.#path)) {
        try {
          return changeLocked(fd, change);
        } finally {
          unlock(fd, this.#path);
        }
      }
      await Bun.sleep(1);
    }
    return undefined;
  }

  /** Anew where somebody has removed it. */
  #open(): number {
    if (this.#fd !== undefined && fstatSync(this.#fd).nlink === 0) this.close();
    this.#fd ??= openOwn(this.#path);
    return this.#fd;
  }
}

/** A file of the cache itself, to read and write, made where it is not there. */
export function openOwn(path: string): number {
  const flags = constants.O_RDWR | constants.O_CREAT | constants.O_NOFOLLOW;
  try {
    return openSync(path, flags, 0o600);
  } catch (error) {
    if (errorCode(error) !== "ENOENT") throw error;
    mkdirSync(dirname(path), { recursive: true, mode: 0o700 });
    return openSync(path, flags, 0o600);
  }
}

const COUNT_BYTES = 20;
const countBuffer = Buffer.alloc(COUNT_BYTES);

function changeLocked(fd: number, change: (now: Count | undefined) => Count | undefined): Count | undefined {
  const length = readSync(fd, countBuffer, 0, COUNT_BYTES, 0);
  const isWhole =
    length === COUNT_BYTES && countBuffer.readUInt32BE(16) === Bun.hash.crc32(countBuffer.subarray(0, 16));
  const now = isWhole ? { bytes: countBuffer.readDoubleBE(0), files: countBuffer.readDoubleBE(8) } : undefined;
  const then = change(now);
  if (!then || then === now) return then;
  countBuffer.writeDoubleBE(then.bytes, 0);
  countBuffer.writeDoubleBE(then.files, 8);
  countBuffer.writeUInt32BE(Bun.hash.crc32(countBuffer.subarray(0, 16)), 16);
  writeSync(fd, countBuffer, 0, COUNT_BYTES, 0);
  return then;
}

/** All chunks, as what they take and when they were used: 16 bytes each. */
export class Found {
  readonly count: Count = { bytes: 0, files: 0 };
  #bytes = new Float64Array(1024);
  #times = new Float64Array(1024);

  add(bytes: number, at: number): void {
    if (this.count.files === this.#bytes.length) {
      this.#bytes = doubled(this.#bytes);
      this.#times = doubled(this.#times);
    }
    this.#bytes[this.count.files] = bytes;
    this.#times[this.count.files] = at;
    this.count.files++;
    this.count.bytes += bytes;
  }

  /** The earliest time up to which there is so much, halving: a sort of all would hold up others longer. */
  timeOf(spare: Count): number {
    let [early, late] = [0, Date.now() + STALE_MS];
    while (late - early > 1e-3) {
      const middle = (early + late) / 2;
      if (this.#hasUntil(middle, spare)) late = middle;
      else early = middle;
    }
    return late;
  }

  #hasUntil(time: number, spare: Count): boolean {
    let [bytes, files] = [0, 0];
    for (let index = 0; index < this.count.files; index++) {
      if (this.#times[index]! > time) continue;
      bytes += this.#bytes[index]!;
      files++;
    }
    return bytes >= spare.bytes && files >= spare.files;
  }
}

function doubled(array: Float64Array<ArrayBuffer>): Float64Array<ArrayBuffer> {
  const larger = new Float64Array(array.length * 2);
  larger.set(array);
  return larger;
}

/** So many at a time; the others in the order in which they came. */
export class Slots {
  free: number;
  readonly #waiting: (() => void)[] = [];

  constructor(count: number) {
    this.free = count;
  }

  async take(): Promise<void> {
    if (this.free > 0) this.free--;
    else await new Promise<void>((resolve) => this.#waiting.push(resolve));
  }

  give(): void {
    const next = this.#waiting.shift();
    if (next) next();
    else this.free++;
  }
}
