/**
 * A chunk of a cache, as it lies on disk: its content, the crc32 of each 256 KiB of it, and a trailer which says of what it
 * is. Nothing of it is given away that was not found to be what it has to be. See cache.ts.
 */
import { closeSync } from "node:fs";
import { readFully } from "./disk.ts";
import { Errno, libc } from "./libc.ts";
import { crc32Combine, type Meta } from "./protocol.ts";

/** Content of one chunk; the last of a file has the rest. */
export const CHUNK_BYTES = 4 * 1024 * 1024;
/** What has a checksum; the session's largest DATA frame. */
const PIECE_BYTES = 256 * 1024;
const SUM_BYTES = 4;
/** In the trailer, behind the sums: magic, the file's hash, the chunk's index u32, its length u32, the crc32 of all behind the content. */
const MAGIC = Buffer.from("reprise1");
const HASH_BYTES = 20;
const TRAILER_BYTES = MAGIC.length + HASH_BYTES + 12;

/** Which chunk, of which version of which file. */
export interface ChunkId {
  name: string;
  hash: Uint8Array;
  index: number;
  /** Of its content. */
  length: number;
}

/** What has been learnt of a chunk. */
export interface Known {
  inode: number;
  sums: Uint32Array;
  /** A bit for each piece that was found to have its sum. */
  checked: number;
}

/** One that is there and open, until it is closed: also when it is removed meanwhile. */
export class Chunk {
  readonly id: ChunkId;
  readonly fd: number;
  readonly #known: Known;

  constructor(id: ChunkId, fd: number, known: Known) {
    this.id = id;
    this.fd = fd;
    this.#known = known;
  }

  /**
   * Whether these bytes are what they have to be. They are in memory then, so that sending them waits for no disk, which
   * would hold up every other connection.
   */
  async holds(offset: number, length: number): Promise<boolean> {
    for (let at = offset - (offset % PIECE_BYTES); at < offset + length; at += PIECE_BYTES) {
      const size = Math.min(PIECE_BYTES, this.id.length - at);
      const bit = 1 << (at / PIECE_BYTES);
      if ((this.#known.checked & bit) !== 0 && this.#isCached(at + size - 1)) continue;
      if (!(await this.#check(at, size))) return false;
      this.#known.checked |= bit;
    }
    return true;
  }

  /** Undefined where they are not to be had. */
  async read(offset: number, length: number): Promise<Uint8Array | undefined> {
    const bytes = Buffer.allocUnsafe(length);
    try {
      return (await readFully(this.fd, bytes, offset)) < length ? undefined : bytes;
    } catch {
      return undefined;
    }
  }

  async checksum(offset: number, length: number): Promise<number | undefined> {
    let sum = 0;
    for (let at = offset; at < offset + length; ) {
      const size = Math.min(offset + length - at, PIECE_BYTES - (at % PIECE_BYTES));
      const sumOfPart = await this.#sumOf(at, size);
      if (sumOfPart === undefined) return undefined;
      sum = crc32Combine(sum, sumOfPart, size);
      at += size;
    }
    return sum;
  }

  close(): void {
    closeSync(this.fd);
  }

  async #sumOf(offset: number, length: number): Promise<number | undefined> {
    const isPiece = offset % PIECE_BYTES === 0 && (length === PIECE_BYTES || offset + length === this.id.length);
    if (isPiece) return this.#known.sums[offset / PIECE_BYTES];
    const content = await this.read(offset, length);
    return content && Bun.hash.crc32(content);
  }

  async #check(offset: number, length: number): Promise<boolean> {
    const scratch = freeScratch.pop() ?? new Uint8Array(PIECE_BYTES);
    try {
      const content = scratch.subarray(0, length);
      if ((await readFully(this.fd, content, offset)) < length) return false;
      return Bun.hash.crc32(content) === this.#known.sums[offset / PIECE_BYTES];
    } catch {
      return false;
    } finally {
      freeScratch.push(scratch);
    }
  }

  #isCached(offset: number): boolean {
    const calls = libc();
    return calls === null || calls.readCached(this.fd, oneByte, offset) !== -Errno.EAGAIN;
  }
}

const oneByte = new Uint8Array(1);
const freeScratch: Uint8Array[] = [];

export function hashOf(name: string, { etag, size }: Meta): Uint8Array {
  const text = JSON.stringify([name, etag, size]);
  return new Bun.CryptoHasher("sha256").update(text).digest().subarray(0, HASH_BYTES);
}

export function sumsOf(content: Uint8Array): Uint32Array {
  const sums = new Uint32Array(Math.ceil(content.length / PIECE_BYTES));
  for (let at = 0; at < content.length; at += PIECE_BYTES)
    sums[at / PIECE_BYTES] = Bun.hash.crc32(content.subarray(at, at + PIECE_BYTES));
  return sums;
}

export function footerBytes(length: number): number {
  return Math.ceil(length / PIECE_BYTES) * SUM_BYTES + TRAILER_BYTES;
}

export function encodeFooter({ hash, index, length }: ChunkId, sums: Uint32Array): Buffer {
  const footer = Buffer.alloc(footerBytes(length));
  let at = 0;
  for (const sum of sums) at = footer.writeUInt32BE(sum, at);
  at += MAGIC.copy(footer, at);
  footer.set(hash, at);
  at = footer.writeUInt32BE(index, at + HASH_BYTES);
  at = footer.writeUInt32BE(length, at);
  footer.writeUInt32BE(Bun.hash.crc32(footer.subarray(0, at)), at);
  return footer;
}

/** Undefined unless it is one of this very chunk. */
export function decodeFooter(id: ChunkId, footer: Buffer): Uint32Array | undefined {
  const sums = new Uint32Array(Math.ceil(id.length / PIECE_BYTES));
  for (const index of sums.keys()) sums[index] = footer.readUInt32BE(index * SUM_BYTES);
  return encodeFooter(id, sums).equals(footer) ? sums : undefined;
}
