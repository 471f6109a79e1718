/**
 * A cache of files that are far away, on a local disk: chunks of 4 MiB, each a file of its own, known by where the file is
 * and by its etag. So nothing in it ever gets old: another version has other chunks, and those of the old one are not
 * asked for again and go in their time.
 *
 * ```
 * DIR/3f/3f…c2-7   chunk 7 of a file: its content, the crc32 of each 256 KiB of it, and a trailer
 * DIR/new/…        chunks that are being written, with what they are going to take in their names
 * DIR/usage        what all of it takes on disk: taken before a chunk is written, given back after one is removed
 * DIR/evict        the lock of the one process that removes what was used least recently
 * ```
 *
 * Any number of processes share a folder, and each may be killed at any moment. A chunk gets its name when it is whole; it
 * is not synced, and so what a power cut has left of it is found out by its checksums: they are looked at where a process
 * uses a piece for the first time, and where a piece comes from disk again. What is wrong is removed, and fetched anew.
 *
 * Nothing here fails a request. Where a chunk can't be kept, for want of room or whatever else, `Cache.chunk` gives none, and
 * the file is read where it comes from.
 *
 * The order of use is that of the files' mtimes. Looking at all of them is what finds the oldest, so that is done not for
 * each chunk, but for a tenth of the cache at a time.
 */
import {
  accessSync,
  closeSync,
  constants,
  fstatSync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  renameSync,
  type Stats,
  statSync,
  unlinkSync,
  utimesSync,
} from "node:fs";
import { dirname, join } from "node:path";
import {
  CHUNK_BYTES,
  Chunk,
  type ChunkId,
  decodeFooter,
  encodeFooter,
  footerBytes,
  hashOf,
  type Known,
  sumsOf,
} from "./cachechunk.ts";
import { type Count, Found, openOwn, Slots, STALE_MS, Usage } from "./cacheroom.ts";
import { isStill, readFully, removeIfThere, tryLock, unlock, writeAll } from "./disk.ts";
import { crc32Combine, type Meta, quote, RepriseError } from "./protocol.ts";
import { type Extent, errorCode, type OpenFile } from "./storage.ts";

/** Disks give room by blocks of this size. */
const BLOCK_BYTES = 4096;

/** Chunks on their way at a time, whole in memory: of a server, and at least of each worker. */
const MAX_FETCHES = 16;
const MIN_FETCHES = 4;
/** Who has read so much in one go has the next chunks fetched while it goes on. */
const SEQUENTIAL_BYTES = CHUNK_BYTES / 2;
const CHUNKS_AHEAD = 2;
/**
 * Above this share of what it may take, chunks are removed, until it is down to the other share of that. There is room for
 * some chunks above: they go on being kept meanwhile, and what does not fit in is never taken for what is not full.
 */
const FULL = 0.97;
const ROOMY = 0.93;
const CHUNKS_ABOVE = 2;
/** Small files make small chunks: there are at most as many as if they had this size on the average. */
const MEAN_BYTES = 64 * 1024;
const MIN_FILES = 1024;
/** A chunk's time is brought up to date this often. */
const TOUCH_MS = 200;
/** After a failure nothing is written for a while: what is fetched to be kept would be fetched twice. */
const PAUSE_MS = 10_000;
/** The same problem is told again after this time. */
const TELL_MS = 3600 * 1000;
/** Chunks whose sums are kept in memory: about 250 bytes each. */
const MAX_KNOWN = 8192;
/** How long a chunk waits for room. */
const ROOM_MS = 50;
/** Looking through the cache lets others run after this long. */
const TURN_MS = 4;

/** What a cache may have open besides a chunk for each file that is read: the chunks being written, the count, the lock. */
export const CACHE_DESCRIPTORS = MAX_FETCHES + 2;

export interface CacheOptions {
  /** On disk, in blocks, over all processes. */
  maxBytes: number;
  /** Processes that the memory for chunks on their way is for. */
  workers?: number;
  /** Is told once what is wrong with the cache. */
  say?: (problem: string) => void;
}

/** A file that is far away. */
export interface Origin extends OpenFile {
  /**
   * Exactly these bytes of this version, at most a chunk of them, at once. Several may be on their way, and it may be called
   * after `close`, for the sake of others who wait for the same.
   */
  fetch(offset: number, length: number): Promise<Uint8Array>;
}

/** A chunk that is being written. */
interface Draft {
  fd: number;
  path: string;
}

type Fetch = () => Promise<Uint8Array>;

export class Cache {
  readonly #folder: string;
  readonly #options: CacheOptions;
  readonly #usage: Usage;
  readonly #slots: Slots;
  readonly #known = new Map<string, Known>();
  /** Chunks on their way, by name: whether they are there now. */
  readonly #coming = new Map<string, Promise<boolean>>();
  readonly #told = new Map<string, number>();
  readonly #most: Count;
  /** Where removing begins. */
  readonly #full: Count;
  #pausedUntil = 0;
  #evicting: Promise<void> | undefined;
  #written = 0;
  #isClosed = false;
  #isOthers = false;

  private constructor(folder: string, options: CacheOptions) {
    this.#folder = folder;
    this.#options = options;
    this.#usage = new Usage(join(folder, "usage"));
    this.#slots = new Slots(Math.max(MIN_FETCHES, Math.floor(MAX_FETCHES / (options.workers ?? 1))));
    const { maxBytes } = options;
    this.#most = { bytes: maxBytes, files: Math.max(MIN_FILES, Math.floor(maxBytes / MEAN_BYTES)) };
    const above = CHUNKS_ABOVE * inBlocks(CHUNK_BYTES + footerBytes(CHUNK_BYTES));
    this.#full = { bytes: Math.min(maxBytes * FULL, maxBytes - above), files: this.#most.files * FULL };
  }

  /**
   * For who starts a server: throws `local` where the folder cannot be used at all. A disk that is full is no reason: there
   * may be room when something goes, of the cache itself as well.
   */
  static check(folder: string): void {
    try {
      makeFolders(folder);
      for (const name of ["usage", "evict"]) closeSync(openOwn(join(folder, name)));
      accessSync(join(folder, "new"), constants.R_OK | constants.W_OK | constants.X_OK);
    } catch (error) {
      const code = errorCode(error);
      if (!WITHOUT_ROOM.has(code)) throw unusable(folder, code, error);
    }
    if (isOpenToOthers(folder)) throw unusable(folder, OTHERS);
  }

  /** Never throws: what is wrong with the folder is told, and reading goes on without it. */
  static open(folder: string, options: CacheOptions): Cache {
    const cache = new Cache(folder, options);
    try {
      makeFolders(folder);
      cache.#checkOwner();
      // The count may be from before a power cut, and what was used may be more than this server is to have.
      if (!cache.#isOthers) cache.#makeRoom();
    } catch (error) {
      cache.#pause(error);
    }
    return cache;
  }

  /** The same file, read by way of this cache. `name` says where it is; its etag and its size say which version. */
  wrap(name: string, origin: Origin): OpenFile {
    if (this.#isOthers) return origin;
    return new CachedFile(this, hashOf(name, origin.meta), origin);
  }

  /** Undefined where it can't be kept. Throws what `fetch` throws. The caller closes what it gets. */
  async chunk(id: ChunkId, fetch: Fetch): Promise<Chunk | undefined> {
    // It may be removed again before it is opened.
    for (let attempts = 0; attempts < 3; attempts++) {
      const chunk = await this.#open(id);
      if (chunk) return chunk;
      if (!(await this.#bring(id, fetch))) return undefined;
    }
    return undefined;
  }

  /** Has the chunk fetched if that holds up nobody who waits for one. */
  fetchAhead(id: ChunkId, fetch: Fetch): void {
    if (this.#coming.has(id.name) || this.#slots.free === 0 || this.#isThere(id)) return;
    // Who comes to need it is told.
    this.#bring(id, fetch).catch(() => {});
  }

  /** Removes a chunk that was found to be wrong. */
  drop(id: ChunkId, fd: number): void {
    this.#tell("damaged", "a chunk of it is not as it was written; it is fetched anew");
    this.#known.delete(id.name);
    const path = this.#pathOf(id);
    if (!isStill(path, fd)) return;
    try {
      const bytes = bytesOnDisk(fstatSync(fd));
      unlinkSync(path);
      void this.#give(bytes);
    } catch (error) {
      this.#pause(error);
    }
  }

  /** What runs goes on to its end. */
  async close(): Promise<void> {
    this.#isClosed = true;
    await Promise.allSettled([...this.#coming.values(), this.#evicting]);
    this.#usage.close();
  }

  /** Until nothing is being fetched or removed. */
  async settled(): Promise<void> {
    while (this.#coming.size > 0 || this.#evicting)
      await Promise.allSettled([...this.#coming.values(), this.#evicting]);
  }

  // ---------------------------------------------------------------------------------------------- chunks

  #pathOf({ name }: ChunkId): string {
    return join(this.#folder, name.slice(0, 2), name);
  }

  #isThere(id: ChunkId): boolean {
    try {
      accessSync(this.#pathOf(id));
      return true;
    } catch {
      return false;
    }
  }

  async #open(id: ChunkId): Promise<Chunk | undefined> {
    const path = this.#pathOf(id);
    let fd: number;
    try {
      fd = openSync(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
    } catch {
      return undefined;
    }
    const stat = fstatSync(fd);
    // Where it can't be read it is as good as damaged.
    const known = await this.#know(id, fd, stat).catch(() => undefined);
    if (known) {
      touch(path, stat);
      return new Chunk(id, fd, known);
    }
    this.drop(id, fd);
    closeSync(fd);
    return undefined;
  }

  /** Undefined for what is no such chunk. */
  async #know(id: ChunkId, fd: number, stat: Stats): Promise<Known | undefined> {
    const known = this.#known.get(id.name);
    if (known?.inode === stat.ino) {
      // The last in the map is the one that was used last.
      this.#known.delete(id.name);
      this.#known.set(id.name, known);
      return known;
    }
    const footer = Buffer.alloc(footerBytes(id.length));
    if (!stat.isFile() || stat.size !== id.length + footer.length) return undefined;
    if ((await readFully(fd, footer, id.length)) < footer.length) return undefined;
    const sums = decodeFooter(id, footer);
    return sums && this.#remember(id, { inode: stat.ino, sums, checked: 0 });
  }

  #remember(id: ChunkId, known: Known): Known {
    this.#known.delete(id.name);
    for (const oldest of this.#known.keys()) {
      if (this.#known.size < MAX_KNOWN) break;
      this.#known.delete(oldest);
    }
    this.#known.set(id.name, known);
    return known;
  }

  // ---------------------------------------------------------------------------------------------- fetching

  /** One for all who want it. Resolves with whether it is there. */
  #bring(id: ChunkId, fetch: Fetch): Promise<boolean> {
    const coming = this.#coming.get(id.name);
    if (coming) return coming;
    const bringing = this.#fetch(id, fetch).finally(() => this.#coming.delete(id.name));
    this.#coming.set(id.name, bringing);
    return bringing;
  }

  async #fetch(id: ChunkId, fetch: Fetch): Promise<boolean> {
    if (this.#isClosed || performance.now() < this.#pausedUntil) return false;
    await this.#slots.take();
    try {
      // Another worker may have been faster.
      if (this.#isThere(id)) return true;
      return await this.#fetchInto(id, fetch);
    } finally {
      this.#slots.give();
    }
  }

  /** The draft is there before room is taken: so whoever counts meanwhile counts it, as large as it is to be. */
  async #fetchInto(id: ChunkId, fetch: Fetch): Promise<boolean> {
    const bytes = inBlocks(id.length + footerBytes(id.length));
    const draft = this.#createDraft(id, bytes);
    if (!draft) return false;
    let [count, isKept]: [Count | undefined, boolean] = [undefined, false];
    try {
      count = await this.#take(bytes);
      isKept = count !== undefined && (await this.#keep(id, draft, await fetch()));
    } finally {
      closeSync(draft.fd);
      if (!isKept) this.#removeDraft(draft.path);
      if (!isKept && count) await this.#give(bytes);
    }
    if (count && this.#isFull(count)) this.#makeRoom();
    return isKept;
  }

  async #keep(id: ChunkId, { fd, path }: Draft, content: Uint8Array): Promise<boolean> {
    if (content.length !== id.length)
      throw new RepriseError("failed", "the server was given another length than it asked for");
    const sums = sumsOf(content);
    try {
      await writeAll(fd, [content, encodeFooter(id, sums)], 0);
      this.#rename(path, this.#pathOf(id));
      this.#remember(id, { inode: fstatSync(fd).ino, sums, checked: -1 });
      return true;
    } catch (error) {
      this.#pause(error);
      return false;
    }
  }

  /** Undefined where none can be made. */
  #createDraft(id: ChunkId, bytes: number): Draft | undefined {
    const path = join(this.#folder, "new", `${id.name}.${process.pid}.${++this.#written}.${bytes}`);
    try {
      return { fd: openOwn(path), path };
    } catch (error) {
      this.#pause(error);
      return undefined;
    }
  }

  #removeDraft(path: string): void {
    try {
      removeIfThere(path);
    } catch {
      // It is found when chunks are removed.
    }
  }

  #rename(from: string, to: string): void {
    try {
      renameSync(from, to);
    } catch (error) {
      if (errorCode(error) !== "ENOENT") throw error;
      mkdirSync(dirname(to), { recursive: true, mode: 0o700 });
      renameSync(from, to);
    }
  }

  #checkOwner(): void {
    this.#isOthers = isOpenToOthers(this.#folder);
    if (this.#isOthers) this.#tell("others", `${OTHERS}; files are read without it`);
  }

  // ---------------------------------------------------------------------------------------------- room

  /** Room for one chunk of so many bytes: what is taken then. Undefined where there is none yet. */
  async #take(bytes: number): Promise<Count | undefined> {
    try {
      let count = await this.#usage.add({ bytes, files: 1 }, this.#most);
      if (!count) {
        // Soon done where little is there, as with a new cache, of which nobody has counted anything.
        this.#makeRoom();
        await Promise.race([this.#evicting, Bun.sleep(ROOM_MS)]);
        count = await this.#usage.add({ bytes, files: 1 }, this.#most);
      }
      return count;
    } catch (error) {
      this.#pause(error);
      return undefined;
    }
  }

  async #give(bytes: number): Promise<void> {
    try {
      await this.#usage.add({ bytes: -bytes, files: -1 });
    } catch (error) {
      this.#pause(error);
    }
  }

  #isFull({ bytes, files }: Count): boolean {
    return bytes > this.#full.bytes || files > this.#full.files;
  }

  /** One process at a time. */
  #makeRoom(): void {
    if (this.#isClosed) return;
    this.#evicting ??= this.#evict()
      .catch((error) => this.#pause(error))
      .finally(() => {
        this.#evicting = undefined;
      });
  }

  async #evict(): Promise<void> {
    const path = join(this.#folder, "evict");
    const fd = openOwn(path);
    try {
      if (!tryLock(fd, path)) return;
      try {
        await this.#evictLocked();
      } finally {
        unlock(fd, path);
      }
    } finally {
      closeSync(fd);
    }
  }

  async #evictLocked(): Promise<void> {
    const before = await this.#usage.read();
    const found = new Found();
    for await (const { bytes, at } of this.#entries()) found.add(bytes, at);
    const spare = { bytes: 0, files: 0 };
    if (this.#isFull(found.count)) {
      spare.bytes = found.count.bytes - this.#full.bytes * ROOMY;
      spare.files = found.count.files - this.#full.files * ROOMY;
    }
    const freed = await this.#remove(spare, found.timeOf(spare));
    await this.#usage.correct(before, {
      bytes: found.count.bytes - freed.bytes,
      files: found.count.files - freed.files,
    });
  }

  /** Removes chunks that were last used at `until` or before, up to so much. */
  async #remove(spare: Count, until: number): Promise<Count> {
    const freed = { bytes: 0, files: 0 };
    if (spare.bytes <= 0 && spare.files <= 0) return freed;
    for await (const { path, bytes, at } of this.#entries()) {
      const isEnough = freed.bytes >= spare.bytes && freed.files >= spare.files;
      // Of those of the last moment there may be many more than have to go.
      if (at > until || (isEnough && at > until - 1)) continue;
      removeIfThere(path);
      freed.bytes += bytes;
      freed.files++;
    }
    return freed;
  }

  /** All chunks, in no order, with what they take and when they were used. What was given up in writing is removed. */
  async *#entries(): AsyncGenerator<{ path: string; bytes: number; at: number }> {
    let turnEndsAt = performance.now() + TURN_MS;
    const now = Date.now();
    const folders = namesIn(this.#folder).filter((name) => /^[0-9a-f]{2}$/.test(name));
    // Drafts first: what gets its name meanwhile is seen twice rather than not at all.
    for (const folder of ["new", ...folders]) {
      const isNew = folder === "new";
      for (const name of namesIn(join(this.#folder, folder))) {
        if (performance.now() >= turnEndsAt) {
          await new Promise((resolve) => setImmediate(resolve));
          turnEndsAt = performance.now() + TURN_MS;
        }
        const draft = /^[0-9a-f]{40}-\d+(?:\.\d+\.\d+\.(\d+))?$/.exec(name);
        if (!draft) continue;
        const path = join(this.#folder, folder, name);
        const stat = lstatSync(path, { throwIfNoEntry: false });
        if (!stat?.isFile()) continue;
        // A time to come is that of a clock that was wrong.
        const at = stat.mtimeMs > now + STALE_MS ? 0 : stat.mtimeMs;
        if (isNew && now - at > STALE_MS) removeIfThere(path);
        else if (isNew) yield { path, bytes: Number(draft[1] ?? 0), at: Number.POSITIVE_INFINITY };
        else yield { path, bytes: bytesOnDisk(stat), at };
      }
    }
  }

  // ---------------------------------------------------------------------------------------------- problems

  #pause(error: unknown): void {
    this.#pausedUntil = performance.now() + PAUSE_MS;
    const code = errorCode(error);
    this.#tell(code, `it can't be used (${code}); files are read without it`);
  }

  #tell(code: string, problem: string): void {
    const now = performance.now();
    if (now - (this.#told.get(code) ?? -TELL_MS) < TELL_MS) return;
    this.#told.set(code, now);
    this.#options.say?.(`the cache ${quote(this.#folder)}: ${problem}`);
  }
}

/** Of system errors: what passes by itself. */
const WITHOUT_ROOM = new Set(["ENOSPC", "EDQUOT"]);
const OTHERS = "others may write there";

function makeFolders(folder: string): void {
  mkdirSync(join(folder, "new"), { recursive: true, mode: 0o700 });
}

/** Checksums tell what is damaged, and not what somebody else has put there. */
function isOpenToOthers(folder: string): boolean {
  return [folder, join(folder, "new")].some((path) => {
    const stat = statSync(path, { throwIfNoEntry: false });
    return stat && ((stat.mode & 0o022) !== 0 || (stat.uid !== 0 && stat.uid !== process.getuid!()));
  });
}

function unusable(folder: string, why: string, cause?: unknown): RepriseError {
  const text = `the cache ${quote(folder)} cannot be used: ${why}; name another folder by --cache, or start without it`;
  return new RepriseError("local", text, cause);
}

/** A hit counts as use. Where the time can't be set, the chunk goes sooner. */
function touch(path: string, { mtimeMs }: Stats): void {
  const now = Date.now();
  if (Math.abs(now - mtimeMs) < TOUCH_MS) return;
  try {
    utimesSync(path, now / 1000, now / 1000);
  } catch {
    // Nothing depends on it.
  }
}

/** None for a folder that is not there. */
function namesIn(folder: string): string[] {
  try {
    return readdirSync(folder);
  } catch (error) {
    if (errorCode(error) === "ENOENT") return [];
    throw error;
  }
}

function inBlocks(bytes: number): number {
  return Math.ceil(bytes / BLOCK_BYTES) * BLOCK_BYTES;
}

function bytesOnDisk({ blocks }: Stats): number {
  return Math.max(blocks * 512, BLOCK_BYTES);
}

// ---------------------------------------------------------------------------------------------------- file

/** A file of which what is asked for comes by way of the cache, a chunk at a time. One call at a time. */
class CachedFile implements OpenFile {
  readonly fd = undefined;
  readonly meta: Meta;
  readonly #cache: Cache;
  readonly #hash: Uint8Array;
  readonly #origin: Origin;
  #chunk: Chunk | undefined;
  /** The chunk that is read from the origin. */
  #without = -1;
  #isClosed = false;
  /** Where the next byte would be, and how many have been read in one go. */
  #next = -1;
  #inOneGo = 0;
  /** The chunk for which those behind it were asked for. */
  #aheadOf = -1;
  /** Nobody wants what is behind. */
  #end: number;

  constructor(cache: Cache, hash: Uint8Array, origin: Origin) {
    this.meta = origin.meta;
    this.#end = origin.meta.size;
    this.#cache = cache;
    this.#hash = hash;
    this.#origin = origin;
  }

  async descriptorFor(offset: number, length: number): Promise<Extent | undefined> {
    if (length === 0 || chunkAt(offset) !== chunkAt(offset + length - 1)) return undefined;
    const chunk = await this.#chunkFor(offset, length);
    return chunk && { fd: chunk.fd, offset: offset % CHUNK_BYTES };
  }

  expect(end: number): void {
    this.#end = Math.min(end, this.meta.size);
    this.#origin.expect?.(end);
  }

  async read(offset: number, length: number): Promise<Uint8Array> {
    if (length === 0) return new Uint8Array(0);
    if (chunkAt(offset) === chunkAt(offset + length - 1)) return this.#readPart(offset, length);
    const parts: Uint8Array[] = [];
    for (const [at, size] of partsOf(offset, length)) parts.push(await this.#readPart(at, size));
    return Buffer.concat(parts);
  }

  async checksum(offset: number, length: number): Promise<number> {
    let sum = 0;
    for (const [at, size] of partsOf(offset, length)) {
      const chunk = await this.#chunkFor(at, size);
      const sumOfPart = (await chunk?.checksum(at % CHUNK_BYTES, size)) ?? (await this.#origin.checksum(at, size));
      sum = crc32Combine(sum, sumOfPart, size);
    }
    return sum;
  }

  verify(): void {
    this.#origin.verify();
  }

  close(): void {
    this.#isClosed = true;
    this.#letGo();
    this.#origin.close();
  }

  async #readPart(offset: number, length: number): Promise<Uint8Array> {
    const chunk = await this.#chunkFor(offset, length);
    return (await chunk?.read(offset % CHUNK_BYTES, length)) ?? this.#origin.read(offset, length);
  }

  /** The chunk, with these bytes of it, which are in it, found to be right; undefined where the origin is to be asked. */
  async #chunkFor(offset: number, length: number): Promise<Chunk | undefined> {
    const index = chunkAt(offset);
    if (index === this.#without) return undefined;
    for (let attempts = 0; attempts < 2; attempts++) {
      const chunk = await this.#turnTo(index);
      if (!chunk) break;
      if (await chunk.holds(offset % CHUNK_BYTES, length)) {
        this.#goAhead(offset, length);
        return chunk;
      }
      this.#cache.drop(chunk.id, chunk.fd);
      this.#letGo();
    }
    this.#without = index;
    return undefined;
  }

  async #turnTo(index: number): Promise<Chunk | undefined> {
    if (this.#chunk?.id.index === index) return this.#chunk;
    this.#letGo();
    const chunk = await this.#cache.chunk(this.#idOf(index), this.#fetchOf(index));
    if (this.#isClosed) {
      chunk?.close();
      throw new RepriseError("failed", "the file was closed while it was read");
    }
    this.#chunk = chunk;
    return chunk;
  }

  /** Whoever reads on and on waits for one chunk, not for each. */
  #goAhead(offset: number, length: number): void {
    const end = offset + length;
    // The same range once more: now its checksum is wanted, or its content.
    if (end === this.#next) return;
    this.#inOneGo = offset === this.#next ? this.#inOneGo + length : length;
    this.#next = end;
    const index = chunkAt(offset);
    if (this.#inOneGo < SEQUENTIAL_BYTES || this.#aheadOf === index) return;
    this.#aheadOf = index;
    for (let ahead = index + 1; ahead <= index + CHUNKS_AHEAD && ahead * CHUNK_BYTES < this.#end; ahead++)
      this.#cache.fetchAhead(this.#idOf(ahead), this.#fetchOf(ahead));
  }

  #idOf(index: number): ChunkId {
    const hash = this.#hash;
    return { name: `${Buffer.from(hash).toString("hex")}-${index}`, hash, index, length: this.#lengthOf(index) };
  }

  #fetchOf(index: number): Fetch {
    return () => this.#origin.fetch(index * CHUNK_BYTES, this.#lengthOf(index));
  }

  #lengthOf(index: number): number {
    return Math.min(CHUNK_BYTES, this.meta.size - index * CHUNK_BYTES);
  }

  #letGo(): void {
    this.#chunk?.close();
    this.#chunk = undefined;
  }
}

function chunkAt(offset: number): number {
  return Math.floor(offset / CHUNK_BYTES);
}

/** A range in parts that lie in one chunk each: offset and length. */
function* partsOf(offset: number, length: number): Generator<[number, number]> {
  for (let at = offset; at < offset + length; ) {
    const size = Math.min(offset + length - at, CHUNK_BYTES - (at % CHUNK_BYTES));
    yield [at, size];
    at += size;
  }
}
