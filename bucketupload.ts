/**
 * One upload to a bucket: what bucketput.ts gives a name when its turn comes.
 *
 * What comes is put together in parts, each of which is sent beside what comes behind it. What fits one part is held until
 * its turn and put at once. Of more S3 makes an upload of its own, which it names, and which is seen by nobody until it is
 * complete; what S3 has of it is written down in `.reprise/put-ID`, so that any server of the bucket goes on with it.
 */
import { type Bucket, type Budget, metaOf, textOfTime } from "./bucket.ts";
import { notHeld, tooLarge, type Upload } from "./changes.ts";
import type { Release } from "./disk.ts";
import { crc32Combine, type Meta, type Put, quote, RepriseError, UNKNOWN_SIZE } from "./protocol.ts";
import { type PutConditions, S3Error } from "./s3.ts";

const MIB = 1024 * 1024;
/** S3 takes none below 5 MiB but the last, and 10,000 of them. */
const LEAST_PART_BYTES = 5 * MIB;
const PART_BYTES = 8 * MIB;
export const MAX_PARTS = 10_000;
/** What a part may have at most, since it is in memory: 625 GiB fit in. */
export const MAX_PART_BYTES = 64 * MIB;
/** Of one upload, sent side by side. */
const MAX_FLIGHTS = 4;

/** One of the parts that S3 has. */
interface HeldPart {
  length: number;
  etag: string;
  crc32: number;
}

/** What is written down of an upload. */
interface State {
  version: 1;
  uploadId: string;
  key: string;
  mtime: number;
  parts: [length: number, etag: string, crc32: number][];
}

/** What the changes of one bucket have in common, in this process. */
export interface Shared {
  bucket: Bucket;
  parts: Budget;
  held: Budget;
  /** Uploads with an id that somebody is at; these that are at their end are waited for. */
  uploads: Map<string, BucketUpload>;
}

export function stateKey({ prefix }: Bucket, id: string): string {
  return `${prefix}.reprise/put-${id}`;
}

/**
 * What can be gone on with: a part that was cut short when its upload was is too small for S3 once others are behind it, and
 * comes again.
 */
export async function readState(bucket: Bucket, id: string): Promise<{ state: State; etag: string } | undefined> {
  const found = await bucket.s3.readAll(stateKey(bucket, id));
  if (!found) return undefined;
  try {
    const state: State = JSON.parse(new TextDecoder().decode(found.body));
    if (!isState(state)) return undefined;
    const short = state.parts.findIndex(([length]) => length < LEAST_PART_BYTES);
    const parts = short < 0 ? state.parts : state.parts.slice(0, short);
    return { state: { ...state, parts }, etag: found.etag };
  } catch {
    return undefined;
  }
}

/** Whoever may write to the bucket may have put it there. */
function isState({ version, uploadId, key, mtime, parts }: State): boolean {
  const isPart = ([length, etag, crc32]: unknown[]) => isCount(length) && typeof etag === "string" && isCount(crc32);
  const areTexts = typeof uploadId === "string" && typeof key === "string";
  return version === 1 && areTexts && Number.isSafeInteger(mtime) && parts.length <= MAX_PARTS && parts.every(isPart);
}

function isCount(value: unknown): boolean {
  return Number.isSafeInteger(value) && (value as number) >= 0;
}

export class BucketUpload implements Upload {
  readonly action = "put";
  readonly request: Put;
  readonly #shared: Shared;
  readonly #key: string;
  readonly #partBytes: number;
  /** In their order; those that are on their way are not here yet. */
  readonly #parts: (HeldPart | undefined)[] = [];
  #uploadId: string | undefined;
  /** The state's, as it was written last. */
  #stateEtag: string | undefined;
  #savedParts = 0;
  #saving: Promise<void> | undefined;
  readonly #flights = new Set<Promise<void>>();
  #failure: unknown;
  /** The part that comes, and what is taken for it from which budget. */
  #part: Uint8Array | undefined;
  #filled = 0;
  #sum = 0;
  #hasher = new Bun.CryptoHasher("sha256");
  #taken: { budget: Budget; bytes: number } | undefined;
  #isDropped = false;
  #isPlaced = false;
  isClosed = false;
  /** All that was on its way when it was closed has come to its end. */
  closed: Promise<void> = Promise.resolve();
  bytes: number;

  constructor(shared: Shared, request: Put, key: string, held: { state: State; etag: string } | undefined) {
    this.#shared = shared;
    this.request = request;
    this.#key = key;
    this.bytes = request.offset;
    const size = request.size === UNKNOWN_SIZE ? 0 : request.size;
    this.#partBytes = Math.max(PART_BYTES, Math.ceil(size / MAX_PARTS / MIB) * MIB);
    if (held) this.#goOn(held);
    if (request.id !== "") shared.uploads.set(request.id, this);
  }

  /** With the parts that end where the content begins. */
  #goOn({ state, etag }: { state: State; etag: string }): void {
    let bytes = 0;
    for (const [length, etag, crc32] of state.parts) {
      if (bytes >= this.request.offset) break;
      this.#parts.push({ length, etag, crc32 });
      bytes += length;
    }
    if (bytes !== this.request.offset) throw notHeld(this.request);
    this.#uploadId = state.uploadId;
    this.#stateEtag = etag;
    this.#savedParts = this.#parts.length;
  }

  write(content: Uint8Array): void {
    // The frame that it lies in is ours until this is done.
    this.#part = content;
    this.#filled = this.bytes = content.length;
  }

  async append(chunk: Uint8Array, crc32: number, free: Release): Promise<void> {
    try {
      await this.#append(chunk, crc32);
    } catch (error) {
      throw this.#shared.bucket.errorOf(error, this.request.path);
    } finally {
      free(chunk);
    }
  }

  async #append(chunk: Uint8Array, crc32: number): Promise<void> {
    if (this.#failure) throw this.#failure;
    const { maxUpload } = this.#shared.bucket;
    if (this.bytes + chunk.length > maxUpload) {
      await this.drop();
      throw tooLarge(this.request, maxUpload);
    }
    for (let at = 0; at < chunk.length; ) {
      const part = await this.#room();
      const piece = chunk.subarray(at, at + part.length - this.#filled);
      part.set(piece, this.#filled);
      this.#hasher.update(piece);
      this.#sum = crc32Combine(this.#sum, piece === chunk ? crc32 : Bun.hash.crc32(piece), piece.length);
      this.#filled += piece.length;
      this.bytes += piece.length;
      at += piece.length;
    }
  }

  /** A part with room in it. What is full waits for more to come: it may be all there is. */
  async #room(): Promise<Uint8Array> {
    if (this.#part && this.#filled < this.#part.length) return this.#part;
    if (this.#part) await this.#send();
    const bytes = this.#nextPartBytes();
    await this.#shared.parts.take(bytes);
    this.#taken = { budget: this.#shared.parts, bytes };
    this.#part = new Uint8Array(bytes);
    this.#filled = this.#sum = 0;
    this.#hasher = new Bun.CryptoHasher("sha256");
    return this.#part;
  }

  /** Where the size is not known, parts become larger before there are too many of them. */
  #nextPartBytes(): number {
    const { size } = this.request;
    if (size !== UNKNOWN_SIZE) return Math.max(1, Math.min(this.#partBytes, size - this.bytes));
    const doublings = Math.max(0, Math.floor((this.#parts.length - MAX_PARTS / 2) / 1000) + 1);
    return Math.min(MAX_PART_BYTES, this.#partBytes * 2 ** doublings);
  }

  /** Sends the part that is full, beside what comes. */
  async #send(): Promise<void> {
    if (this.#parts.length >= MAX_PARTS) throw tooLarge(this.request, this.bytes);
    const body = this.#part!.subarray(0, this.#filled);
    const [taken, crc32, sha256] = [this.#taken!, this.#sum, this.#hasher.digest("hex")];
    this.#part = this.#taken = undefined;
    const index = this.#parts.push(undefined) - 1;
    try {
      while (this.#flights.size >= MAX_FLIGHTS) await Promise.race(this.#flights);
      await this.#begin();
      if (this.#failure) throw this.#failure;
    } catch (error) {
      taken.budget.give(taken.bytes);
      throw error;
    }
    const flight = this.#sendPart(index, body, crc32, sha256)
      .catch((error) => {
        this.#failure ??= error;
      })
      .finally(() => {
        taken.budget.give(taken.bytes);
        this.#flights.delete(flight);
      });
    this.#flights.add(flight);
  }

  async #begin(): Promise<void> {
    const { s3 } = this.#shared.bucket;
    this.#uploadId ??= await s3.createUpload(this.#key, textOfTime(this.request.mtime));
  }

  async #sendPart(index: number, body: Uint8Array, crc32: number, sha256: string): Promise<void> {
    const { s3 } = this.#shared.bucket;
    const etag = await s3.putPart(this.#key, this.#uploadId!, index + 1, body, sha256).catch(async (error) => {
      if (!isLost(error)) throw error;
      // The bucket has given it up, as it may be told to after some days: it is to begin anew.
      await this.#forgetState();
      throw notHeld(this.request);
    });
    this.#parts[index] = { length: body.length, etag, crc32 };
    // Of many parts not each is written down at once: what is written grows with them.
    if (this.#countHeld() - this.#savedParts >= Math.max(1, this.#parts.length >> 6)) await this.#save();
  }

  /** Nobody goes on with it, unless another server has begun it anew by now. */
  async #forgetState(): Promise<void> {
    this.#isDropped = true;
    if (this.#stateEtag === undefined) return;
    const { bucket } = this.#shared;
    const held = await readState(bucket, this.request.id);
    if (held?.state.uploadId === this.#uploadId) await bucket.s3.remove(stateKey(bucket, this.request.id));
  }

  /** From the first on, without a gap. */
  #countHeld(): number {
    const gap = this.#parts.indexOf(undefined);
    return gap < 0 ? this.#parts.length : gap;
  }

  /** Writes down what S3 has. Throws `in_use` where somebody else has gone on with the upload. */
  async #save(): Promise<void> {
    if (this.request.id === "" || this.#isDropped) return;
    while (this.#saving) await this.#saving;
    const count = this.#countHeld();
    if (count <= this.#savedParts || this.#isDropped) return;
    this.#saving = this.#saveNow(count).finally(() => {
      this.#saving = undefined;
    });
    await this.#saving;
  }

  async #saveNow(count: number): Promise<void> {
    const { bucket } = this.#shared;
    const parts = this.#parts.slice(0, count).map((part) => [part!.length, part!.etag, part!.crc32] as const);
    const state = { version: 1, uploadId: this.#uploadId, key: this.#key, mtime: this.request.mtime, parts };
    const [key, text] = [stateKey(bucket, this.request.id), JSON.stringify(state)];
    const conditions: PutConditions = this.#stateEtag ? { ifMatch: this.#stateEtag } : { ifNoneMatch: "*" };
    try {
      this.#stateEtag = await bucket.s3.put(key, text, conditions);
    } catch (error) {
      if (!isConflict(error)) throw error;
      // It may be ours, and only the answer was lost.
      const found = await bucket.s3.readAll(key);
      if (!found || new TextDecoder().decode(found.body) !== text) throw inUse(this.request);
      this.#stateEtag = found.etag;
    }
    this.#savedParts = count;
  }

  async settle(): Promise<void> {
    try {
      await this.#settle();
    } catch (error) {
      throw this.#shared.bucket.errorOf(error, this.request.path);
    }
  }

  /** What fits one part is kept for its turn, if there is room to keep it; else it goes where the parts are. */
  async #settle(): Promise<void> {
    if (this.#part && this.#taken && !this.#failure) {
      const { parts, held } = this.#shared;
      const isWhole = this.#parts.length === 0 && this.#taken.budget === parts && held.tryTake(this.#filled);
      if (isWhole) {
        parts.give(this.#taken.bytes);
        this.#taken = { budget: held, bytes: this.#filled };
      } else if (this.#taken.budget === parts) await this.#send();
    }
    while (this.#flights.size > 0) await Promise.race(this.#flights);
    if (this.#failure) throw this.#failure;
  }

  /** Gives it its name. */
  async place(conditions: PutConditions): Promise<Meta> {
    const { s3 } = this.#shared.bucket;
    const { mtime } = this.request;
    if (this.#uploadId === undefined) {
      const body = this.#part?.subarray(0, this.#filled) ?? new Uint8Array(0);
      const etag = await this.#putWhole(body, conditions);
      this.#isPlaced = true;
      return { kind: "file", size: body.length, mtime, etag };
    }
    const parts = this.#parts.map((part, index) => ({ number: index + 1, etag: part!.etag }));
    let etag = this.#etag;
    try {
      // Where objects are encrypted it does not follow from those of the parts.
      etag = (await s3.completeUpload(this.#key, this.#uploadId, parts, conditions)) || etag;
    } catch (error) {
      // A try before it may have done it, unheard.
      const isRetried = isConflict(error) && error.isRetried;
      if (!isLost(error) && !isRetried) throw error;
      const info = await s3.head(this.#key);
      if (info?.etag !== etag) {
        if (isRetried) throw error;
        await this.drop();
        throw inUse(this.request);
      }
    }
    this.#isPlaced = true;
    // Whoever asks what is held of it now learns that there is nothing, and looks under its name.
    if (this.#savedParts > 0) await s3.remove(stateKey(this.#shared.bucket, this.request.id)).catch(() => {});
    const info = await s3.head(this.#key);
    if (info?.etag === etag) return metaOf(info);
    return { kind: "file", size: this.bytes, mtime, etag };
  }

  async #putWhole(body: Uint8Array, conditions: PutConditions): Promise<string> {
    const { s3 } = this.#shared.bucket;
    try {
      return await s3.put(this.#key, body, { mtime: textOfTime(this.request.mtime), ...conditions });
    } catch (error) {
      // The try before it may be what is there now.
      if (!isConflict(error) || !error.isRetried) throw error;
      const etag = new Bun.CryptoHasher("md5").update(body).digest("hex");
      const info = await s3.head(this.#key);
      if (info?.etag !== etag || metaOf(info).mtime !== this.request.mtime) throw error;
      return etag;
    }
  }

  /** What S3 makes of those of the parts. */
  get #etag(): string {
    const hasher = new Bun.CryptoHasher("md5");
    for (const part of this.#parts) hasher.update(Buffer.from(part!.etag, "hex"));
    return `${hasher.digest("hex")}-${this.#parts.length}`;
  }

  async drop(): Promise<void> {
    this.#isDropped = true;
    this.#release();
    await Promise.allSettled([...this.#flights]);
    const { s3 } = this.#shared.bucket;
    try {
      if (this.#uploadId !== undefined && !this.#isPlaced) await s3.abortUpload(this.#key, this.#uploadId);
      await this.#forgetState();
    } catch {
      // The sweep comes for what is left.
    }
  }

  close(): void {
    if (this.isClosed) return;
    this.isClosed = true;
    this.#release();
    this.closed = this.#leave().catch(() => {
      // The sweep comes for what is left.
    });
  }

  #release(): void {
    if (this.#taken) this.#taken.budget.give(this.#taken.bytes);
    this.#part = this.#taken = undefined;
  }

  /** What is on its way is still written down for whoever goes on. */
  async #leave(): Promise<void> {
    const { uploads, bucket } = this.#shared;
    const { id } = this.request;
    try {
      await Promise.allSettled([...this.#flights]);
      if (this.#isPlaced || this.#isDropped || this.#uploadId === undefined) return;
      if (id === "") await bucket.s3.abortUpload(this.#key, this.#uploadId);
      else await this.#save();
    } finally {
      if (uploads.get(id) === this) uploads.delete(id);
    }
  }
}

// ---------------------------------------------------------------------------------------------------- errors

export function isConflict(error: unknown): error is S3Error {
  return error instanceof S3Error && ["PreconditionFailed", "ConditionalRequestConflict"].includes(error.code);
}

/** S3 knows nothing of the upload, or has other parts: it was completed, dropped, or somebody else sends it, too. */
function isLost(error: unknown): boolean {
  return error instanceof S3Error && ["NoSuchUpload", "InvalidPart", "NoSuchKey"].includes(error.code);
}

function inUse({ path }: Put): RepriseError {
  return new RepriseError("in_use", `${quote(path)} is being received by another server as well`);
}
