/**
 * An upload as an exchange: content goes out while an early refusal is listened for, and after a lost connection it goes
 * on at the first byte that the server does not hold.
 */
import { ChunkSize } from "./connection.ts";
import { nameOf, type Peer, SentOn } from "./peer.ts";
import { type Exchange, isOfOne } from "./pipeline.ts";
import { crc32Combine, ERRORS, HEADER_BYTES, type Meta, type Put, RepriseError } from "./protocol.ts";
import type { Remote } from "./remote.ts";
import { type Source, SourceChanged } from "./source.ts";

/** As END's count: what was sent before is not to be used. */
const GIVEN_UP = Number.MAX_SAFE_INTEGER;

/** What an upload is to become, and under which condition. */
export type PutOptions = Pick<Put, "path" | "id" | "noClobber" | "etag" | "parents">;

export interface UploadHooks {
  /** It is sent from `offset` on; what is before has this crc32. */
  begin?(size: number, offset: number, crc32: number): void;
  /** So many bytes were sent, from the source's start, and have this crc32. */
  progress?(bytes: number, crc32: number): void;
}

/** An upload, gone on with over whatever connections it takes. */
export class UploadExchange implements Exchange {
  readonly #remote: Remote;
  readonly #options: PutOptions;
  readonly #source: Source;
  readonly #hooks: UploadHooks;
  /** The server may hold something of it. */
  #begun: boolean;
  /** All of it was sent once, so that it may be done, whatever has come of the answer. */
  #sentBytes: number | undefined;
  #offset = 0;
  /** Of what was sent, from the source's start. */
  #crc32 = 0;
  #restarts = 0;
  #agreedBytes = 0;
  #at = 0;
  #answered = false;
  /** Who got all of that. */
  #server: string | undefined;
  /** Why it was given up in the middle. */
  #problem: RepriseError | undefined;
  #meta: Meta | undefined;
  #error: RepriseError | undefined;

  constructor(remote: Remote, options: PutOptions, source: Source, hooks: UploadHooks, begun: boolean) {
    this.#remote = remote;
    this.#options = options;
    this.#source = source;
    this.#hooks = hooks;
    this.#begun = begun;
  }

  /** The new version. Throws why there is none. */
  result(): Meta {
    if (this.#meta) return this.#meta;
    throw this.#error ?? new Error("The upload has not been run");
  }

  /** Finds out how much of the source the server holds, or whether it was done already. */
  preparation() {
    if (!this.#begun) return undefined;
    return async (peer: Peer) => {
      const { id } = this.#options;
      this.#offset = id === "" ? 0 : await this.#agreed(await peer.sums(id, ""));
      this.#noteLoss(peer);
      if (this.#offset > this.#agreedBytes) peer.progress = true;
      this.#agreedBytes = Math.max(this.#agreedBytes, this.#offset);
      if (this.#offset > 0 || this.#sentBytes === undefined) return;
      this.#meta = await this.#findDone(peer, this.#sentBytes);
      // Of what was compared in vain.
      if (!this.#meta) this.#crc32 = 0;
    };
  }

  /** What one replica holds of an upload, others do not. */
  #noteLoss(peer: Peer): void {
    const server = nameOf(peer.address);
    if (this.#server === undefined || this.#server === server || this.#offset >= this.#at) return;
    this.#remote.note(
      `${server} holds ${this.#offset} of the ${this.#at} bytes that ${this.#server} got; sending the rest`,
    );
  }

  async ask(peer: Peer): Promise<void> {
    if (this.#meta) return;
    const { size, mtime } = this.#source;
    this.#answered = false;
    this.#problem = undefined;
    this.#begun = true;
    this.#hooks.begin?.(size, this.#offset, this.#crc32);
    await peer.ask({ action: "put", ...this.#options, offset: this.#offset, size, mtime });
    try {
      await this.#send(peer);
      // Refused in the middle, it may be closed already.
      if (!this.#answered) this.#source.verify();
    } catch (error) {
      if (!(error instanceof RepriseError) || error.code !== "local") throw error;
      this.#problem = error;
      return peer.end(GIVEN_UP);
    }
    if (!this.#answered) this.#sentBytes = this.#at;
    await peer.end(this.#at - this.#offset);
  }

  async take(peer: Peer): Promise<boolean> {
    if (this.#meta) return false;
    try {
      const { type: _, offset: _offset, ...meta } = await peer.expect("meta");
      this.#meta = meta;
      return false;
    } catch (error) {
      this.#answered = true;
      if (peer.isGreeted) this.#server = nameOf(peer.address);
      // What was held went away, or got its name, between the question and the upload.
      if (isOfOne(error) && error.code === "bad_range" && ++this.#restarts <= this.#remote.retries) return true;
      const problem = isOfOne(error) ? this.#problem : undefined;
      if (!problem) throw error;
      return this.#startAgain(problem);
    }
  }

  failed(error: RepriseError): void {
    this.#error = error;
  }

  async #send(peer: Peer): Promise<void> {
    const most = this.#remote.chunkBytes;
    const size = new ChunkSize(most);
    const frame = new Uint8Array(HEADER_BYTES + most);
    this.#at = this.#offset;
    while (!this.#answered) {
      const startedAt = performance.now();
      const want = Math.min(size.bytes, this.#source.size - this.#at);
      const content = frame.subarray(HEADER_BYTES, HEADER_BYTES + want);
      const count = want === 0 ? 0 : await this.#source.read(this.#at, content);
      if (count === 0) break;
      const crc32 = await peer.content(frame.subarray(0, HEADER_BYTES + count));
      this.#at += count;
      this.#crc32 = crc32Combine(this.#crc32, crc32, count);
      this.#hooks.progress?.(this.#at, this.#crc32);
      size.took(performance.now() - startedAt);
      await peer.pace(count);
    }
  }

  /** What changed is sent again from its start, a few times. Throws the problem where that is no way out. */
  #startAgain(problem: RepriseError): true {
    if (!(problem instanceof SourceChanged)) throw problem;
    if (++this.#restarts > this.#remote.retries) {
      throw new RepriseError("local", `${problem.message}, again and again; put it when it is at rest`);
    }
    this.#remote.note(`${problem.message}; starting again`);
    this.#source.renew();
    this.#offset = this.#crc32 = 0;
    this.#sentBytes = undefined;
    this.#begun = false;
    return true;
  }

  /** The position up to which the server holds what the source holds. */
  async #agreed(sums: { length: number; crc32: number }[]): Promise<number> {
    let offset = 0;
    this.#crc32 = 0;
    for (const { length, crc32 } of sums) {
      if ((await this.#source.sum(offset, length)) !== crc32) break;
      offset += length;
      this.#crc32 = crc32Combine(this.#crc32, crc32, length);
    }
    return offset;
  }

  /** The version of the source, if that is under its name: then only the answer was lost. */
  async #findDone(peer: Peer, bytes: number): Promise<Meta | undefined> {
    try {
      return await this.#findSame(peer, bytes);
    } catch (error) {
      if (error instanceof SentOn) return this.#findDoneElsewhere(error, bytes);
      if (isOfOne(error)) return undefined;
      throw error;
    }
  }

  /** Who has the newest version may be who died before it could answer: then it is sent again. */
  async #findDoneElsewhere(sentOn: SentOn, bytes: number): Promise<Meta | undefined> {
    try {
      return await this.#remote.elsewhere(sentOn, (holder) => this.#findSame(holder, bytes));
    } catch (error) {
      if (error instanceof RepriseError && (ERRORS[error.code].retry || isOfOne(error))) return undefined;
      throw error;
    }
  }

  async #findSame(peer: Peer, bytes: number): Promise<Meta | undefined> {
    await peer.ask({ action: "stat", path: this.#options.path });
    const { kind, size, mtime, etag } = await peer.expectHeld("meta");
    const looksSame = kind === "file" && mtime === this.#source.mtime && size === bytes;
    if (!looksSame || etag === this.#options.etag) return undefined;
    // An old version may look the same: only its content tells.
    const isSame = (await this.#agreed(await peer.sums("", this.#options.path))) === bytes;
    return isSame ? { kind, size, mtime, etag } : undefined;
  }
}
