/**
 * A root: what holds the files that a server gives away, and the only way from a name on the wire to a file.
 *
 * `Root` is the interface; `openFolder` gives the implementation on a directory, that of bucket.ts is on S3. Nothing
 * escapes: a path is checked by [paths] of protocol.ts and then resolved beneath the root by descriptor, so that no name,
 * link or race leads outside. Symbolic links are not followed, anywhere beneath the root, and what is neither a file nor
 * a folder is never opened.
 *
 * A file is read as one version or not at all: its etag comes from inode, size, mtime and ctime, and is compared again
 * after each read. A change within the clock tick of the one before would leave no trace in it; so a file that changed
 * less than `SETTLE_MS` ago is looked at again after that time, before anything is said of it.
 */
import { isUtf8 } from "node:buffer";
import { type BigIntStats, closeSync, constants, fstatSync, lstatSync, openSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { isInMemory, readCached, readFully } from "./disk.ts";
import { Dirent, DirentKind, Errno, type FolderCalls, folderCalls, type Identity, libc, type Stat } from "./libc.ts";
import {
  BufferPool,
  crc32Combine,
  type Entry,
  MAX_PATH_BYTES,
  MAX_WHOLE_BYTES,
  type Meta,
  quote,
  RepriseError,
  splitPath,
} from "./protocol.ts";

/** Two ticks of the slowest usual kernel clock (100 Hz). */
const SETTLE_MS = 20;
/** Something that is written all the time never settles; whoever reads it is told `changed` soon enough. */
const MAX_LOOKS = 10;
/** Checksums are kept for pieces of this size, aligned. */
const PIECE_BYTES = 256 * 1024;
/** Checksums that are kept, over all files: 4 bytes for each 256 KiB, so 4 MiB stand for 256 GiB. */
const MAX_KEPT_SUMS = 1024 * 1024;
/** And for so many files at the most: each costs more than its sums when they are few. */
const MAX_KEPT_FILES = 4096;
/** Of a folder's records at a time, about a thousand: glibc's own readdir takes as many. */
const FOLDER_BUFFER_BYTES = 32 * 1024;
/** Of the folders in a folder, so many are known before the first of them is listed. */
const MAX_FOLDERS_AHEAD = 1000;
/** A listing lets others run after this long; each entry costs a look at its inode. */
const TURN_MS = 4;
/** What stands in a string for bytes that are not UTF-8. */
const REPLACEMENT = "\ufffd";
const O_PATH = 0o10000000;

export interface Root {
  /** Throws `not_found`, `bad_name`, `refused`, as do all of these. */
  stat(path: string): Promise<Meta>;
  /** Throws `not_a_file` as well. The caller closes what it gets. */
  open(path: string): Promise<OpenFile>;
  /**
   * A file of up to MAX_WHOLE_BYTES at once, if nothing has to be waited for; undefined if `open` is the way. Its content
   * stays as it is until the next call. Throws as `open`.
   */
  readNow(path: string): { meta: Meta; content: Uint8Array } | undefined;
  /**
   * The entries of a folder as they come, with those of the folders below it if `recursive`, as many at a time as can
   * be had without holding up others, however deep, with one descriptor. Files have their etag if `etags`. Throws
   * `not_a_folder`.
   */
  list(path: string, recursive: boolean, etags?: boolean): AsyncIterable<Entry[]>;
  /**
   * One of its folders as a root of its own: whatever folder has that name at the moment. Not to be closed, and of no use
   * when this is. Throws `not_a_folder`.
   */
  beneath(path: string): MaybePromise<Root>;
  /** What is wrong with the storage at this moment, of which a folder would know nothing before it is used. */
  problem?(): Promise<string | undefined>;
  close(): void;
}

/** What a directory of this machine is at once, and others after a while. */
export type MaybePromise<T> = T | Promise<T>;

/** A root that is a directory of this machine. */
export interface Folder extends Root {
  /** The same as `stat`, at once: a change of the last moment may hide behind its etag. Undefined for nothing. */
  look(path: string): Meta | undefined;
  beneath(path: string): Folder;
}

/** What peers know versions by. In a cluster that is not what the storage of one member calls them. */
export interface Etags {
  /** Of a file, by its path in the whole root, of which the storage's own is `etag`. */
  of(path: string, etag: string): string;
}

/** Where a range of a file lies: in the file itself, or in something that holds a part of it. */
export interface Extent {
  fd: number;
  /** Of the range's first byte. */
  offset: number;
}

/** One version of one file. Every method throws `changed` once the file is another, `failed` if it can't be read. */
export interface OpenFile {
  readonly meta: Meta;
  /** The file itself, where it is one of a file system. */
  readonly fd: number | undefined;
  /**
   * Where these bytes can be sent from by descriptor; undefined where `read` is the only way to them. It holds until
   * another range is asked for, by any method, or `close`.
   */
  descriptorFor(offset: number, length: number): Extent | undefined | Promise<Extent | undefined>;
  /** Nothing behind `end` is going to be read: for who reads ahead. */
  expect?(end: number): void;
  /** Reads exactly `length` bytes at `offset`. */
  read(offset: number, length: number): Promise<Uint8Array>;
  /** The crc32 of these bytes; what it is made of is kept, so that a file in demand is read once. */
  checksum(offset: number, length: number): Promise<number>;
  verify(): void;
  close(): void;
}

/**
 * Throws `not_found`, `not_a_folder` or `refused`, with the path as it was given. Without `etags` versions have the
 * storage's own, as they always have where `list` and `look` are asked.
 */
export function openFolder(path: string, etags?: Etags): Folder {
  try {
    return new FolderRoot(openSync(path, constants.O_RDONLY | constants.O_DIRECTORY), "", etags);
  } catch (error) {
    const code = errorCode(error);
    if (code === "ENOENT") throw new RepriseError("not_found", `not found: the root folder ${quote(path)}`, error);
    if (code === "ENOTDIR") throw new RepriseError("not_a_folder", `not a folder: the root ${quote(path)}`, error);
    throw new RepriseError("refused", `the root folder ${quote(path)} cannot be opened: ${code}`, error);
  }
}

/** Of a server that only sends clients on: whoever asks it for a file all the same is to come back. */
export function noRoot(): Root {
  const refuse = (): never => {
    throw new RepriseError("busy", "this server only sends clients on; ask the one that it names");
  };
  const root: Root = {
    stat: refuse,
    open: refuse,
    readNow: refuse,
    list: refuse,
    // Whoever may have one folder alone is sent on like others.
    beneath: () => root,
    close() {},
  };
  return root;
}

/** Names that the server keeps to itself: its own folder, and files that are not finished. */
export function isHidden(name: string): boolean {
  return name === ".reprise" || name.startsWith(".reprise-") || name.endsWith(".part");
}

// ---------------------------------------------------------------------------------------------------- folder

class FolderRoot implements Folder {
  readonly #fd: number;
  /** The folder in it that this is about; "" for itself. */
  readonly #folder: string;
  readonly #etags: Etags | undefined;
  readonly #device: bigint;
  /** There is no disk to wait for. */
  readonly #inMemory: boolean;

  constructor(fd: number, folder: string, etags: Etags | undefined) {
    this.#fd = fd;
    this.#folder = folder;
    this.#etags = etags;
    this.#device = fstatSync(fd, { bigint: true }).dev;
    this.#inMemory = isInMemory(fd);
  }

  async stat(path: string): Promise<Meta> {
    const at = this.#locate(path);
    try {
      return this.#metaOf(await settled(at), path);
    } finally {
      closeSync(at);
    }
  }

  async open(path: string): Promise<OpenFile> {
    const at = this.#locate(path);
    try {
      const stat = await settled(at);
      if (stat.isDirectory()) throw new RepriseError("not_a_file", `not a file: ${quote(path)} is a folder`);
      const meta = this.#metaOf(stat, path);
      return new FolderFile(openForReading(at, path), stat, meta, path, this.#isInMemory(stat));
    } finally {
      closeSync(at);
    }
  }

  readNow(path: string): { meta: Meta; content: Uint8Array } | undefined {
    const at = this.#locate(path);
    try {
      const stat = fstatSync(at, { bigint: true });
      if (!stat.isFile() || stat.size > MAX_WHOLE_BYTES || unsettledMs(stat) > 0) return undefined;
      const meta = this.#metaOf(stat, path);
      const file = new FolderFile(openForReading(at, path), stat, meta, path, this.#isInMemory(stat));
      try {
        const content = file.readNow();
        return content && { meta: file.meta, content };
      } finally {
        file.close();
      }
    } finally {
      closeSync(at);
    }
  }

  #metaOf(stat: BigIntStats, path: string): Meta {
    const meta = metaOf(stat, path);
    if (this.#etags && meta.kind === "file") meta.etag = this.#etags.of(join(this.#folder, path), meta.etag);
    return meta;
  }

  #isInMemory(stat: BigIntStats): boolean {
    return this.#inMemory && stat.dev === this.#device;
  }

  look(path: string): Meta | undefined {
    let at: number | undefined;
    try {
      at = this.#locate(path);
      return metaOf(fstatSync(at, { bigint: true }), path);
    } catch (error) {
      if (error instanceof RepriseError && error.code === "not_found") return undefined;
      throw error;
    } finally {
      if (at !== undefined) closeSync(at);
    }
  }

  async *list(path: string, recursive: boolean, etags = false): AsyncGenerator<Entry[]> {
    const turn = new Turn();
    const levels = [new Level("", recursive, etags)];
    for (let level = levels.at(-1); level; level = levels.at(-1)) {
      // Here too, for the sake of folders without an entry.
      if (turn.isOver) await turn.next();
      const folder = level.nextFolder();
      if (folder !== undefined) levels.push(new Level(folder, true, etags));
      else if (level.position === undefined) levels.pop();
      else yield* this.#readLevel(path, level, turn);
    }
    // A list without what is in them must not pass for whole: `sync --delete` would remove it elsewhere.
    if (turn.refused) throw turn.refused;
  }

  /**
   * A folder below the one that was asked for and that went away meanwhile, or may not be read, is left out: the others
   * are still true. Not so where the server failed, for want of descriptors or by its disk: what was there would be
   * missing from a list that has its end.
   */
  async *#readLevel(path: string, level: Level, turn: Turn): AsyncGenerator<Entry[]> {
    try {
      yield* this.#readOn(join(path, level.below), level, turn);
    } catch (error) {
      if (level.below === "" || !(error instanceof RepriseError) || error.code === "failed") throw error;
      if (error.code === "refused") turn.refused ??= error;
      level.position = undefined;
    }
  }

  async *#readOn(path: string, level: Level, turn: Turn): AsyncGenerator<Entry[]> {
    const folder = this.#openFolder(path);
    try {
      yield* inTurns(await entriesIn(folder, path, level), turn);
    } finally {
      closeSync(folder);
    }
  }

  beneath(path: string): Folder {
    closeSync(this.#openFolder(path));
    return new FolderRoot(this.#fd, join(this.#folder, path), this.#etags);
  }

  #openFolder(path: string): number {
    const at = this.#locate(path);
    try {
      if (!fstatSync(at).isDirectory()) throw new RepriseError("not_a_folder", `not a folder: ${quote(path)}`);
      return openForReading(at, path);
    } finally {
      closeSync(at);
    }
  }

  close(): void {
    closeSync(this.#fd);
  }

  #locate(path: string): number {
    return locateIn(this.#fd, this.#folder, path);
  }
}

class FolderFile implements OpenFile {
  readonly fd: number;
  readonly meta: Meta;
  readonly #stat: BigIntStats;
  readonly #path: string;
  readonly #inMemory: boolean;

  constructor(fd: number, stat: BigIntStats, meta: Meta, path: string, inMemory: boolean) {
    this.fd = fd;
    this.#stat = stat;
    this.meta = meta;
    this.#path = path;
    this.#inMemory = inMemory;
  }

  descriptorFor(offset: number): Extent {
    return { fd: this.fd, offset };
  }

  async read(offset: number, length: number): Promise<Uint8Array> {
    const bytes = Buffer.allocUnsafe(length);
    await this.#fill(bytes, offset);
    this.verify();
    return bytes;
  }

  /** All of it, if it is in memory and not longer than `scratchNow`, of which the answer is a view until the next call. */
  readNow(): Uint8Array | undefined {
    const content = scratchNow.subarray(0, this.meta.size);
    if (readCached(this.fd, content, 0, this.#inMemory) < content.length) return undefined;
    this.verify();
    return content;
  }

  async checksum(offset: number, length: number): Promise<number> {
    let sum = 0;
    for (let at = offset; at < offset + length; ) {
      const size = Math.min(offset + length - at, PIECE_BYTES - (at % PIECE_BYTES));
      sum = crc32Combine(sum, await this.#checksumOfPiece(at, size), size);
      at += size;
    }
    this.verify();
    return sum;
  }

  async #checksumOfPiece(offset: number, length: number): Promise<number> {
    const { etag, size } = this.meta;
    const known = keptSums.get(etag, size, offset, length);
    if (known !== undefined && this.#isCached(offset + length - 1)) return known;
    const scratch = takeScratch();
    try {
      const content = scratch.subarray(0, length);
      await this.#fill(content, offset);
      this.verify();
      const sum = Bun.hash.crc32(content);
      keptSums.set(etag, size, offset, length, sum);
      return sum;
    } finally {
      freeScratch.push(scratch);
    }
  }

  verify(): void {
    const { size, mtimeNs, ctimeNs, nlink } = fstatSync(this.fd, { bigint: true });
    const was = this.#stat;
    if (size !== was.size || mtimeNs !== was.mtimeNs) throw changed(this.#path);
    // Replaced by a rename, or removed: that touches ctime alone, and what is open stays the version it was.
    if (ctimeNs !== was.ctimeNs && nlink !== 0n) throw changed(this.#path);
  }

  close(): void {
    closeSync(this.fd);
  }

  async #fill(bytes: Uint8Array, offset: number): Promise<void> {
    try {
      if ((await readFully(this.fd, bytes, offset, this.#inMemory)) === bytes.length) return;
    } catch (error) {
      throw new RepriseError("failed", `the server could not read ${quote(this.#path)}`, error);
    }
    throw changed(this.#path);
  }

  /** A page that left the cache would make sendfile wait for the disk, and with it every other connection. */
  #isCached(offset: number): boolean {
    const calls = libc();
    return calls === null || calls.readCached(this.fd, oneByte, offset) !== -Errno.EAGAIN;
  }
}

const oneByte = new Uint8Array(1);
const scratchNow = new Uint8Array(MAX_WHOLE_BYTES);

/** Scratch space for reading what is only summed up: one is enough until a disk is slow. */
const freeScratch: Uint8Array[] = [];
function takeScratch(): Uint8Array {
  return freeScratch.pop() ?? new Uint8Array(PIECE_BYTES);
}

// ---------------------------------------------------------------------------------------------------- names

/**
 * A descriptor of what a path names beneath `root`. It only stands for the place (O_PATH): opening it blocks on nothing
 * and wakes no device. Throws `not_found`, `bad_name`, `refused`.
 */
export function locate(root: number, path: string): number {
  const segments = splitPath(path);
  if (segments.some(isHidden)) throw notFound(path);
  const fd = locateBeneath(root, path) ?? walkBeneath(root, segments);
  if (fd < 0) throw errorFor(-fd, path);
  return fd;
}

/** The same in a folder beneath `root`. Nothing that is said of it names the folder. */
export function locateIn(root: number, folder: string, path: string): number {
  if (folder === "") return locate(root, path);
  const at = locateFolder(root, folder, path);
  try {
    return locate(at, path);
  } finally {
    closeSync(at);
  }
}

function locateFolder(root: number, folder: string, path: string): number {
  try {
    return locate(root, folder);
  } catch (error) {
    throw error instanceof RepriseError && error.code !== "failed" ? notFound(path) : error;
  }
}

/** openat2: the kernel resolves beneath the root. Undefined where there is no such call, or not for such a path. */
function locateBeneath(root: number, path: string): number | undefined {
  const calls = libc();
  if (!calls || openat2IsMissing) return undefined;
  for (;;) {
    const fd = calls.openBeneath(root, path === "" ? "." : path);
    if (fd === -Errno.ENOSYS || fd === -Errno.EPERM) {
      openat2IsMissing = true;
      return undefined;
    }
    // Of the 4,096 bytes that a path may have, the kernel's own limit takes one: the walk knows no such limit.
    if (fd === -Errno.ENAMETOOLONG) return undefined;
    // EAGAIN: something was renamed meanwhile and the kernel could not be sure.
    if (fd !== -Errno.EAGAIN && fd !== -Errno.EINTR) return fd;
  }
}
let openat2IsMissing = false;

/** The same, one descriptor for each segment: a link swapped in at any moment is met as a link, and refused. */
function walkBeneath(root: number, segments: string[]): number {
  let fd = openPlace(beneath(root), constants.O_DIRECTORY);
  for (const [index, name] of segments.entries()) {
    if (fd < 0) break;
    const parent = fd;
    const folder = index < segments.length - 1 ? constants.O_DIRECTORY : 0;
    fd = openPlace(`${beneath(parent)}/${name}`, constants.O_NOFOLLOW | folder);
    closeSync(parent);
  }
  return fd;
}

/** A descriptor, or -errno. */
function openPlace(path: string, flags: number): number {
  try {
    return openSync(path, O_PATH | flags);
  } catch (error) {
    return -errorNumber(error);
  }
}

export function beneath(fd: number): string {
  return `/proc/self/fd/${fd}`;
}

function openForReading(fd: number, path: string): number {
  try {
    return openSync(beneath(fd), constants.O_RDONLY | constants.O_NONBLOCK);
  } catch (error) {
    throw errorFor(errorNumber(error), path);
  }
}

/** Of a folder, or "" for the root, and a path in it. */
export function join(folder: string, below: string): string {
  return folder === "" || below === "" ? folder + below : `${folder}/${below}`;
}

// ---------------------------------------------------------------------------------------------------- entries

/** Cuts what may be a million entries into stretches of `TURN_MS`. */
class Turn {
  #endsAt = performance.now() + TURN_MS;
  /** Of the folders that may not be read, the first. */
  refused: RepriseError | undefined;

  get isOver(): boolean {
    return performance.now() >= this.#endsAt;
  }

  async next(): Promise<void> {
    await new Promise((resolve) => setImmediate(resolve));
    this.#endsAt = performance.now() + TURN_MS;
  }
}

/**
 * A folder on the way of a list. It is closed before those in it are opened: a tree may be 2,000 levels deep, and one
 * peer must not hold as many descriptors. So it is read until it has shown some folders, and then on from there.
 */
class Level {
  /** Relative to the folder that was asked for. */
  readonly below: string;
  /** Where to read on, as the file system counts; undefined at the end. */
  position: bigint | undefined = 0n;
  readonly #recursive: boolean;
  /** Files are to have their etag. */
  readonly etags: boolean;
  /** Names alone, since there may be many. */
  #folders: string[] = [];
  #taken = 0;

  constructor(below: string, recursive: boolean, etags: boolean) {
    this.below = below;
    this.#recursive = recursive;
    this.etags = etags;
  }

  get prefix(): string {
    return this.below === "" ? "" : `${this.below}/`;
  }

  get isFull(): boolean {
    return this.#folders.length >= MAX_FOLDERS_AHEAD;
  }

  /** Notes a folder to be listed itself, and gives the entry back. */
  note(name: string, entry: Entry | undefined): Entry | undefined {
    if (this.#recursive && entry?.kind === "folder") this.#folders.push(name);
    return entry;
  }

  /** The next of the folders that were found, relative to the folder that was asked for. */
  nextFolder(): string | undefined {
    const name = this.#folders[this.#taken++];
    if (name !== undefined) return join(this.below, name);
    this.#folders = [];
    this.#taken = 0;
    return undefined;
  }
}

/** Arrays, because an async generator costs more for each step than all else for an entry. */
async function* inTurns(found: Iterable<Entry | undefined>, turn: Turn): AsyncGenerator<Entry[]> {
  let entries: Entry[] = [];
  for (const entry of found) {
    if (entry) entries.push(entry);
    if (!turn.isOver) continue;
    if (entries.length > 0) yield entries;
    entries = [];
    await turn.next();
  }
  if (entries.length > 0) yield entries;
}

/** Undefined for each name that is not shown: hidden, not to be asked for, a link, a device, or gone meanwhile. */
async function entriesIn(folder: number, path: string, level: Level): Promise<Iterable<Entry | undefined>> {
  const calls = folderCalls();
  if (calls) return readEntries(calls, folder, path, level);
  try {
    return lookUpEntries(folder, await readdir(beneath(folder)), level);
  } catch (error) {
    throw errorFor(errorNumber(error), path);
  }
}

/** By getdents64 and statx: a buffer full at a time, however large the folder is. */
function* readEntries(calls: FolderCalls, folder: number, path: string, level: Level): Generator<Entry | undefined> {
  const { prefix, position = 0n } = level;
  if (position !== 0n) seek(calls, folder, position, path);
  const buffer = folderBuffers.take(FOLDER_BUFFER_BYTES)!;
  const records = Buffer.from(buffer.buffer);
  try {
    while (!level.isFull) {
      const end = calls.readFolder(folder, records);
      if (end < 0 && end !== -Errno.EINTR) throw errorFor(-end, path);
      if (end === 0) level.position = undefined;
      if (end === 0) return;
      for (let at = 0, next = 0; at < end; at = next) {
        next = at + records.readUInt16LE(at + Dirent.lengthAt);
        if (next >= end) level.position = records.readBigInt64LE(at + Dirent.nextAt);
        yield readEntry(calls, folder, records, at, level, prefix);
      }
    }
  } finally {
    folderBuffers.give(buffer);
  }
}

function seek(calls: FolderCalls, folder: number, position: bigint, path: string): void {
  const errno = calls.seekFolder(folder, position);
  if (errno < 0) throw errorFor(-errno, path);
}

const folderBuffers = new BufferPool(FOLDER_BUFFER_BYTES);

function readEntry(
  calls: FolderCalls,
  folder: number,
  records: Buffer,
  at: number,
  level: Level,
  prefix: string,
): Entry | undefined {
  const type = records[at + Dirent.kindAt];
  if (type !== DirentKind.file && type !== DirentKind.folder && type !== DirentKind.unknown) return undefined;
  const start = at + Dirent.nameAt;
  const end = records.indexOf(0, start);
  const name = records.toString("utf8", start, end);
  if (!isShown(name, prefix)) return undefined;
  if (name.includes(REPLACEMENT) && !isUtf8(records.subarray(start, end))) return undefined;
  const stat = calls.statAt(folder, records, start);
  // Such calls are known to be forbidden to containers.
  if (stat === -Errno.ENOSYS || stat === -Errno.EPERM) return level.note(name, entryAt(folder, name, level));
  if (typeof stat === "number") return unlessGone(-stat, prefix + name);
  const entry = entryOf(stat, prefix + name);
  if (entry?.kind === "file" && level.etags) entry.etag = etagOf(calls.identity());
  return level.note(name, entry);
}

function entryOf({ kind, size, mtime }: Stat, path: string): Entry | undefined {
  if (kind === "other" || !isSendable(size, mtime)) return undefined;
  return { kind, size: kind === "folder" ? 0 : size, mtime, path };
}

/**
 * The stand-in, by node:fs, which gives a folder's names all at once. Names that are not UTF-8 come with U+FFFD in them
 * and are not found by that; but should there be a name with a true one, it may come more than once.
 */
function* lookUpEntries(folder: number, names: string[], level: Level): Generator<Entry | undefined> {
  const { prefix } = level;
  const seen = new Set<string>();
  for (const name of names) {
    if (seen.has(name) || !isShown(name, prefix)) yield undefined;
    else yield level.note(name, entryAt(folder, name, level));
    if (name.includes(REPLACEMENT)) seen.add(name);
  }
  level.position = undefined;
}

function entryAt(folder: number, name: string, { prefix, etags }: Level): Entry | undefined {
  try {
    const { kind, size, mtime, etag } = metaOf(lstatSync(`${beneath(folder)}/${name}`, { bigint: true }), name);
    return { kind, size, mtime, path: prefix + name, ...(etags && kind === "file" && { etag }) };
  } catch (error) {
    if (error instanceof RepriseError) return undefined;
    return unlessGone(errorNumber(error), prefix + name);
  }
}

/** What went away meanwhile, or may not be looked at, is left out; whatever else happens is no answer. */
function unlessGone(errno: number, path: string): undefined {
  if (errno !== Errno.ENOENT && errno !== Errno.EACCES) throw errorFor(errno, path);
}

/** Not shown are hidden names and those that can't be asked for. */
function isShown(name: string, prefix: string): boolean {
  if (name === "." || name === ".." || isHidden(name) || /[\r\n]/.test(name)) return false;
  return Buffer.byteLength(prefix + name) <= MAX_PATH_BYTES;
}

// ---------------------------------------------------------------------------------------------------- versions

/** Looks again after a moment where a change might hide behind the tick of the clock: see the top of this file. */
async function settled(fd: number): Promise<BigIntStats> {
  for (let looks = 1; ; looks++) {
    const stat = fstatSync(fd, { bigint: true });
    const ms = unsettledMs(stat);
    if (ms === 0 || looks === MAX_LOOKS) return stat;
    await Bun.sleep(ms);
  }
}

/** How long a change may still be hidden. */
function unsettledMs(stat: BigIntStats): number {
  if (!stat.isFile()) return 0;
  const age = Date.now() - Math.floor(Number(stat.ctimeNs) / 1e6);
  return age < 0 || age >= SETTLE_MS ? 0 : SETTLE_MS - age;
}

export function metaOf(stat: BigIntStats, path: string): Meta {
  const mtime = Number(stat.mtimeNs / 1000n);
  if (!isSendable(Number(stat.size), mtime)) {
    throw new RepriseError("refused", `refused: the size or time of ${quote(path)} is beyond 2^53`);
  }
  if (stat.isFile()) return { kind: "file", size: Number(stat.size), mtime, etag: etagOf(stat) };
  if (stat.isDirectory()) return { kind: "folder", size: 0, mtime, etag: "" };
  const what = stat.isSymbolicLink() ? "a symbolic link" : "neither a file nor a folder";
  throw new RepriseError("refused", `refused: ${quote(path)} is ${what}`);
}

/** Numbers over 2^53-1 have no place in a frame: a year after 2255, or a file with an immense hole. */
function isSendable(size: number, mtime: number): boolean {
  return Number.isSafeInteger(size) && Number.isSafeInteger(mtime);
}

const etagFields = new BigInt64Array(4);

/** Hashed, because an inode number is nobody's business. */
export function etagOf(stat: Identity): string {
  etagFields[0] = stat.ino;
  etagFields[1] = stat.size;
  etagFields[2] = stat.mtimeNs;
  etagFields[3] = stat.ctimeNs;
  return Bun.hash.xxHash64(etagFields).toString(16).padStart(16, "0");
}

/** The checksums of pieces by etag. Those kept longest go first; a sum of 0 counts as not known and is found again. */
class KeptSums {
  readonly #byEtag = new Map<string, Uint32Array>();
  #count = 0;

  get(etag: string, size: number, offset: number, length: number): number | undefined {
    if (!isPiece(size, offset, length)) return undefined;
    return this.#byEtag.get(etag)?.[offset / PIECE_BYTES] || undefined;
  }

  set(etag: string, size: number, offset: number, length: number, sum: number): void {
    const pieces = Math.ceil(size / PIECE_BYTES);
    if (!isPiece(size, offset, length) || pieces > MAX_KEPT_SUMS) return;
    const sums = this.#byEtag.get(etag) ?? this.#add(etag, pieces);
    sums[offset / PIECE_BYTES] = sum;
  }

  #add(etag: string, pieces: number): Uint32Array {
    for (const [oldest, sums] of this.#byEtag) {
      if (this.#count + pieces <= MAX_KEPT_SUMS && this.#byEtag.size < MAX_KEPT_FILES) break;
      this.#byEtag.delete(oldest);
      this.#count -= sums.length;
    }
    const sums = new Uint32Array(pieces);
    this.#byEtag.set(etag, sums);
    this.#count += pieces;
    return sums;
  }
}

function isPiece(size: number, offset: number, length: number): boolean {
  return offset % PIECE_BYTES === 0 && length === Math.min(PIECE_BYTES, size - offset);
}

const keptSums = new KeptSums();

// ---------------------------------------------------------------------------------------------------- errors

function notFound(path: string): RepriseError {
  return new RepriseError("not_found", `not found: ${quote(path)}`);
}

function changed(path: string): RepriseError {
  return new RepriseError("changed", `changed on the server: ${quote(path)}`);
}

function errorFor(errno: number, path: string): RepriseError {
  switch (errno) {
    case Errno.ENOENT:
    case Errno.ENOTDIR:
      return notFound(path);
    case Errno.ELOOP:
      return new RepriseError("refused", `refused: ${quote(path)} leads over a symbolic link`);
    case Errno.EXDEV:
    case Errno.ENAMETOOLONG:
      return new RepriseError("bad_name", `not found: ${quote(path)}`);
    case Errno.EACCES:
      return new RepriseError("refused", `refused: the server may not read ${quote(path)}`);
    case Errno.EMFILE:
    case Errno.ENFILE:
      return new RepriseError("failed", "the server has too many files open");
    default:
      return new RepriseError("failed", `the server could not open ${quote(path)}`);
  }
}

export function errorCode(error: unknown): string {
  return (error as NodeJS.ErrnoException).code ?? String(error);
}

function errorNumber(error: unknown): number {
  return Math.abs((error as NodeJS.ErrnoException).errno ?? Errno.EIO);
}
