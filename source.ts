/**
 * What an upload is read from: a file, which can be read again from anywhere, or a stream, of which the last stretch is
 * kept so that a lost connection can be gone on with.
 */
import { closeSync, constants, fstatSync, openSync } from "node:fs";
import { crc32Of, readFully, readSome } from "./disk.ts";
import { quote, RepriseError, SUM_BYTES, UNKNOWN_SIZE } from "./protocol.ts";
import { etagOf } from "./storage.ts";

/**
 * What a stream keeps to send again: what can be under way when a connection is lost, which the socket buffers of both
 * sides bound (by default 4 and 6 MiB), and before it one stretch that a checksum tells about.
 */
const KEPT_BYTES = 32 * 1024 * 1024;

/** How long after the end of a stream a signal may still come. */
const SIGNAL_MS = 20;

export interface Source {
  readonly name: string;
  /** Bytes, or UNKNOWN_SIZE. */
  readonly size: number;
  /** Microseconds since 1970. */
  readonly mtime: number;
  /** Fills `into` from `offset` on; less than that only at the end. Throws `local`. */
  read(offset: number, into: Uint8Array): Promise<number>;
  /** The crc32 of a range that was read before; undefined where there is none such. */
  sum(offset: number, length: number): Promise<number | undefined>;
  /** Throws `SourceChanged` if what was read was not one version. */
  verify(): void;
  /** Takes the present version instead. */
  renew(): void;
  close(): void;
}

/** The file that is being sent has become another. */
export class SourceChanged extends RepriseError {
  constructor(name: string) {
    super("local", `${quote(name)} changed while it was sent`);
  }
}

export class FileSource implements Source {
  readonly name: string;
  size = 0;
  mtime = 0;
  /** Of this version of the file. */
  etag = "";
  #fd = -1;

  /** Throws `local`: not there, no permission, not a file. */
  constructor(name: string) {
    this.name = name;
    this.renew();
  }

  renew(): void {
    this.close();
    this.#fd = openSource(this.name);
    const stat = fstatSync(this.#fd, { bigint: true });
    this.size = Number(stat.size);
    this.mtime = Number(stat.mtimeNs / 1000n);
    this.etag = etagOf(stat);
    if (stat.isFile()) return;
    this.close();
    if (stat.isDirectory()) throw new RepriseError("not_a_file", `not a file: ${quote(this.name)} is a folder; use -r`);
    throw new RepriseError("local", `cannot send ${quote(this.name)}: it is no file`);
  }

  async read(offset: number, into: Uint8Array): Promise<number> {
    try {
      return await readFully(this.#fd, into, offset);
    } catch (error) {
      throw asLocalSource(error, this.name);
    }
  }

  async sum(offset: number, length: number): Promise<number | undefined> {
    try {
      return await crc32Of(this.#fd, offset, length);
    } catch (error) {
      throw asLocalSource(error, this.name);
    }
  }

  /** Removed or replaced under its name, it still is the version it was: only what touches the content counts. */
  verify(): void {
    const stat = fstatSync(this.#fd, { bigint: true });
    const same = Number(stat.size) === this.size && Number(stat.mtimeNs / 1000n) === this.mtime;
    if (!same) throw new SourceChanged(this.name);
  }

  close(): void {
    if (this.#fd >= 0) closeSync(this.#fd);
    this.#fd = -1;
  }
}

/** Standard input, a pipe, a device. */
export class StreamSource implements Source {
  readonly name: string;
  readonly size = UNKNOWN_SIZE;
  readonly mtime = Math.floor((performance.timeOrigin + performance.now()) * 1000);
  readonly #fd: number;
  readonly #expected: number | undefined;
  readonly #kept = new Uint8Array(KEPT_BYTES);
  /** Of each whole stretch of SUM_BYTES; the last is that of what there is of it. */
  readonly #sums: number[] = [];
  /** How much has been read from the stream. */
  #end = 0;

  /** `expected` bytes, where the user knows how many it must be. */
  constructor(fd: number, name: string, expected?: number) {
    this.#fd = fd;
    this.name = name;
    this.#expected = expected;
  }

  async read(offset: number, into: Uint8Array): Promise<number> {
    if (offset < this.#end) return this.#readKept(offset, into);
    let have = 0;
    while (have < into.length) {
      const count = await this.#readMore(into.subarray(have));
      if (count === 0) {
        // What ends us by a signal ends the stream's other side as well: its end must not pass for that of the content.
        await Bun.sleep(SIGNAL_MS);
        break;
      }
      this.#keep(into.subarray(have, have + count));
      have += count;
    }
    return have;
  }

  async sum(offset: number, length: number): Promise<number | undefined> {
    if (length === SUM_BYTES && offset + length <= this.#end) return this.#sums[offset / SUM_BYTES];
    if (offset + length === this.#end) return this.#sums.at(-1);
    if (offset < this.#end - KEPT_BYTES || offset + length > this.#end) return undefined;
    const bytes = new Uint8Array(length);
    this.#copyKept(offset, bytes);
    return Bun.hash.crc32(bytes);
  }

  verify(): void {
    if (this.#expected === undefined || this.#expected === this.#end) return;
    throw new RepriseError(
      "local",
      `${this.name} ended after ${this.#end} bytes, not ${this.#expected}; nothing was put`,
    );
  }
  renew(): void {}
  close(): void {}

  async #readMore(into: Uint8Array): Promise<number> {
    for (;;) {
      try {
        return await readSome(this.#fd, into, null);
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== "EAGAIN") throw asLocalSource(error, this.name);
        // Some other process has set the pipe to not block.
        await Bun.sleep(5);
      }
    }
  }

  #readKept(offset: number, into: Uint8Array): number {
    if (offset < this.#end - KEPT_BYTES) {
      throw new RepriseError(
        "local",
        `${this.name} cannot be read again from byte ${offset}, which the server has lost`,
      );
    }
    const count = Math.min(into.length, this.#end - offset);
    this.#copyKept(offset, into.subarray(0, count));
    return count;
  }

  #keep(bytes: Uint8Array): void {
    for (let at = 0; at < bytes.length; ) {
      const start = this.#end % KEPT_BYTES;
      const index = Math.floor(this.#end / SUM_BYTES);
      const room = Math.min(KEPT_BYTES - start, SUM_BYTES - (this.#end % SUM_BYTES));
      const piece = bytes.subarray(at, at + room);
      this.#kept.set(piece, start);
      this.#sums[index] = Bun.hash.crc32(piece, this.#sums[index] ?? 0);
      this.#end += piece.length;
      at += piece.length;
    }
  }

  #copyKept(offset: number, into: Uint8Array): void {
    for (let at = 0; at < into.length; ) {
      const start = (offset + at) % KEPT_BYTES;
      const piece = this.#kept.subarray(start, Math.min(KEPT_BYTES, start + into.length - at));
      into.set(piece, at);
      at += piece.length;
    }
  }
}

function openSource(name: string): number {
  try {
    return openSync(name, constants.O_RDONLY | constants.O_NONBLOCK);
  } catch (error) {
    throw asLocalSource(error, name);
  }
}

const READ_REASONS: Record<string, string> = {
  ENOENT: "it is not there",
  ENOTDIR: "a part of the path is a file",
  EACCES: "no permission",
  EPERM: "no permission",
  EISDIR: "a folder; use -r",
  ELOOP: "links in a circle",
};

export function asLocalSource(error: unknown, name: string): RepriseError {
  if (error instanceof RepriseError) return error;
  const { code, message } = error as NodeJS.ErrnoException;
  return new RepriseError("local", `cannot read ${quote(name)}: ${READ_REASONS[code ?? ""] ?? message}`, error);
}
