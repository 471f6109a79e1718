/**
 * The writing side of a root: what clients put, remove, move and make, on disk before it is acknowledged.
 *
 * Content is staged in `ROOT/.reprise/`, which is never listed or served, under a name of the upload's own. Changes are
 * then applied in groups: the staged files are synced side by side, all take their names in order under one lock that
 * the workers share, and the folders are synced. A reader sees the old file or the new one, whole; a crash leaves
 * nothing but a staged file, which an upload with an id can go on with for a week.
 *
 * Names are resolved as for reading, beneath the root by descriptor: see storage.ts.
 */
import { randomUUID } from "node:crypto";
import {
  closeSync,
  constants,
  fchmodSync,
  fstatSync,
  ftruncateSync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  renameSync,
  rmdirSync,
  statfsSync,
  unlinkSync,
  writeSync,
} from "node:fs";
import { rm } from "node:fs/promises";
import {
  crc32Of,
  Held,
  isInMemory,
  isRunning,
  openLocked,
  type Release,
  removeIfThere,
  setTime,
  syncTogether,
  tryLock,
  unlock,
  WriteQueue,
} from "./disk.ts";
import { libc } from "./libc.ts";
import {
  type Meta,
  type Put,
  quote,
  RepriseError,
  type Request,
  SUM_BYTES,
  splitPath,
  UNKNOWN_SIZE,
} from "./protocol.ts";
import {
  type Etags,
  errorCode,
  etagOf,
  isHidden,
  join,
  locateIn,
  type MaybePromise,
  metaOf,
  beneath as pathOf,
} from "./storage.ts";

const STAGING = ".reprise";
const NEW_FLAGS = constants.O_RDWR | constants.O_CREAT | constants.O_EXCL | constants.O_NOFOLLOW;
/** What an upload that was given up leaves is kept this long. */
const KEEP_MS = 7 * 24 * 3600 * 1000;
/** The lock that all workers share is held for some milliseconds at a time. */
const LOCK_RETRY_MS = 1;
const LOCK_LIMIT_MS = 10_000;
/**
 * Uploads take so much between two looks at the free space; a look costs 4 µs. What other workers take meanwhile is not
 * seen, so each of them may go so far beyond the limit: it is also the most that one has taken and not yet written.
 */
const LOOK_BYTES = 4 * 1024 * 1024;
/** Folders that all groups of a process together may have open; each may have those of one change all the same. */
const MAX_OPEN_FOLDERS = 256;
/** Folders that are made with those above them can be so deep: for more, one change would hold too many of them. */
const MAX_DEPTH = 128;
/** What even an empty file takes of a disk. */
const BLOCK_BYTES = 4096;

type NameChange = Extract<Request, { action: "remove" | "move" | "mkdir" }>;
export type Change = Upload | NameChange | Correction;
export type FolderChange = FolderUpload | NameChange | Correction;
/**
 * What the keeper of a cluster changes, each only where there still is the version `etag`: a file goes, or its name alone;
 * a folder, whose etag is "", goes only if it is empty.
 */
export type Correction =
  | { action: "clear"; path: string; etag: string }
  | { action: "aside"; path: string; etag: string; to: string };
/** What became of a change: the new version of an upload, nothing for others, or what was wrong. */
export type Outcome = Meta | RepriseError | undefined;

/** The writing side of a root, whatever that is on. */
export interface Changes {
  /** One of its folders as a root of its own, as that of `Root`, staged where all is. Not to be closed. */
  beneath(folder: string): Changes;
  /**
   * Begins to take an upload. What is known to end in an error later is refused now. Throws `not_found` for the folder,
   * `not_a_file`, `exists`, `changed`, `in_use`, `bad_range`, `too_large`, `no_room`.
   */
  receive(put: Put, isSmall: boolean): MaybePromise<Upload>;
  /** Makes the changes in their order. Returns when all that succeeded are there to stay. */
  apply(changes: Change[]): Promise<Outcome[]>;
  /** Checksums of what is held of an upload, from its start. */
  sums(id: string): AsyncIterable<{ length: number; crc32: number }>;
  /** Removes what nobody will go on with: what was left by mistake, and uploads that are a week old. */
  sweep(now?: number): Promise<void>;
  close(): void;
}

/** A file on its way into the root. */
export interface Upload {
  readonly action: "put";
  readonly request: Put;
  /** Bytes held, from the start. */
  readonly bytes: number;
  /** Takes the chunk's memory over until it calls `free` with it. Throws `too_large`, `no_room`, `failed`. */
  append(chunk: Uint8Array, crc32: number, free: Release): Promise<void>;
  /** All of a small one. Throws as `append`. */
  write(content: Uint8Array): void;
  /** All that was appended is where it is to be staged. Throws as `append`. */
  settle(): Promise<void>;
  /** Forgets what is staged. */
  drop(): MaybePromise<void>;
  /** Lets go of it; what is staged stays for an upload that can go on. */
  close(): void;
}

export interface ChangesOptions {
  /** The folder in the root where content is staged; hidden, see `isHidden`. */
  staging?: string;
  /** Makes of a system error on a path what is said of it. */
  wrap?: Wrap;
  /** Whether anybody wants to know the etag of what was put. */
  versions?: boolean;
  /** What clients know the versions by that are to be replaced; undefined for the storage's own. */
  etags?: Etags | undefined;
  /** Bytes of the largest file that is taken; undefined for any. */
  maxUpload?: number | undefined;
  /** Bytes that uploads leave free on the file system; 0 does not look. */
  keepFree?: number;
}
type Wrap = (error: unknown, path: string) => RepriseError;

/** A folder that can be written, made if it is not there. Throws system errors. */
export function openChanges(root: string, options: ChangesOptions = {}): FolderChanges {
  const { staging = STAGING, wrap = errorOf, versions = true, etags, maxUpload = UNKNOWN_SIZE, keepFree = 0 } = options;
  mkdirSync(`${root}/${staging}`, { mode: 0o700, recursive: true });
  const flags = constants.O_RDONLY | constants.O_DIRECTORY;
  const rootFd = openSync(root, flags);
  const stagingFd = openSync(`${root}/${staging}`, flags | constants.O_NOFOLLOW);
  const limits = { maxBytes: maxUpload, room: keepFree > 0 ? new Room(stagingFd, keepFree) : undefined };
  return new FolderChanges(rootFd, stagingFd, wrap, versions, etags, limits);
}

export class FolderChanges implements Changes {
  readonly #root: number;
  readonly #staging: string;
  readonly #stagingFd: number;
  readonly #lock: number;
  readonly #inMemory: boolean;
  readonly #wrap: Wrap;
  readonly #versions: boolean;
  readonly #etags: Etags | undefined;
  readonly #limits: Limits;
  /** The folder in the root that this is about; "" for itself. */
  readonly #folder: string;
  readonly #anonymous = `new-${process.pid}-${randomUUID().slice(0, 8)}`;
  #count = 0;

  constructor(
    root: number,
    staging: number,
    wrap: Wrap,
    versions: boolean,
    etags: Etags | undefined,
    limits: Limits,
    beneath?: { folder: string; lock: number },
  ) {
    this.#wrap = wrap;
    this.#versions = versions;
    this.#etags = etags;
    this.#limits = limits;
    this.#root = root;
    this.#stagingFd = staging;
    this.#staging = pathOf(staging);
    this.#folder = beneath?.folder ?? "";
    this.#lock =
      beneath?.lock ?? openSync(this.#lockPath, constants.O_RDWR | constants.O_CREAT | constants.O_NOFOLLOW, 0o600);
    this.#inMemory = isInMemory(staging);
  }

  beneath(folder: string): FolderChanges {
    const below = { folder, lock: this.#lock };
    return new FolderChanges(this.#root, this.#stagingFd, this.#wrap, this.#versions, this.#etags, this.#limits, below);
  }

  receive(put: Put, isSmall: boolean): FolderUpload {
    if (!isSmall) this.#check(put);
    if (put.id !== "" && !/^[0-9a-f]{32}$/.test(put.id)) throw new RepriseError("refused", "refused: not an upload id");
    const name = put.id === "" ? `${this.#anonymous}-${++this.#count}` : `put-${put.id}`;
    const staged = { folder: this.#stagingFd, name, path: `${this.#staging}/${name}` };
    try {
      if (bytesKnownOf(put) > this.#limits.maxBytes) {
        // Taken when more was allowed: nobody can go on with it.
        if (put.id !== "") removeUpload(staged.path);
        throw tooLarge(put, this.#limits.maxBytes);
      }
      return FolderUpload.open(put, staged, this.#wrap, this.#limits);
    } catch (error) {
      throw this.#wrap(error, put.path);
    }
  }

  /** Bytes that uploads may still take of the file system. */
  get freeBytes(): number {
    return (this.#limits.room ?? new Room(this.#stagingFd, 0)).look();
  }

  /** Bytes that are held of an upload. */
  held(id: string): number {
    return Number(lookAt(`${this.#staging}/put-${id}`)?.size ?? 0);
  }

  /** Nobody goes on with that upload. */
  forget(id: string): void {
    removeUpload(`${this.#staging}/put-${id}`);
  }

  /**
   * Makes the changes in their order, but for those that are no longer wanted when their turn comes: these are `changed`.
   * Returns when all that succeeded are on disk.
   */
  async apply(changes: FolderChange[], isWanted: (at: number) => boolean = () => true): Promise<Outcome[]> {
    const outcomes: Outcome[] = await this.#syncContents(changes);
    let at = 0;
    try {
      while (at < changes.length) at = await this.#applyFrom(at, changes, outcomes, isWanted);
    } catch (error) {
      if (at === 0) throw error;
      // Those before are made, and stay so.
      for (; at < changes.length; at++) outcomes[at] ??= this.#wrap(error, pathOfChange(changes[at]!));
    }
    return outcomes;
  }

  /** Makes as many as there are folders for, and syncs these; returns where to go on. */
  async #applyFrom(
    start: number,
    changes: FolderChange[],
    outcomes: Outcome[],
    isWanted: (at: number) => boolean,
  ): Promise<number> {
    const folders = new Folders(this.#root, this.#folder);
    let end = start;
    try {
      const release = await this.#takeLock();
      try {
        do outcomes[end] ??= isWanted(end) ? this.#make(changes[end]!, folders) : superseded(changes[end]!);
        while (++end < changes.length && !folders.areMany);
      } finally {
        release();
      }
      if (!this.#inMemory) await this.#syncFolders(folders, changes, outcomes, start, end);
      return end;
    } finally {
      folders.close();
    }
  }

  async *sums(id: string): AsyncGenerator<{ length: number; crc32: number }> {
    let fd: number;
    try {
      fd = openSync(`${this.#staging}/put-${id.replace(/[^0-9a-f]/g, "")}`, constants.O_RDONLY | constants.O_NOFOLLOW);
    } catch {
      return;
    }
    try {
      const { size } = fstatSync(fd);
      for (let at = 0; at < size; at += SUM_BYTES) {
        const length = Math.min(SUM_BYTES, size - at);
        const crc32 = await crc32Of(fd, at, length);
        if (crc32 === undefined) return;
        yield { length, crc32 };
      }
    } finally {
      closeSync(fd);
    }
  }

  /** Removes what nobody will go on with: of ended workers, of removed folders, and uploads that are a week old. */
  async sweep(now = Date.now()): Promise<void> {
    // What cannot be removed keeps nothing else from it.
    for (const name of readdirSync(this.#staging)) await this.#sweepOne(name, now).catch(() => {});
  }

  async #sweepOne(name: string, now: number): Promise<void> {
    const path = `${this.#staging}/${name}`;
    const [kind, pid] = name.split("-");
    if (kind === "trash") await rm(path, { recursive: true, force: true });
    else if (kind === "new" && !isRunning(Number(pid))) removeIfThere(path);
    else if (kind === "put" && !name.endsWith(".lock") && isOld(path, now)) removeUpload(path);
  }

  close(): void {
    for (const fd of [this.#lock, this.#stagingFd, this.#root]) closeSync(fd);
  }

  /** The same, of a root that nobody else writes in this way: nothing staged stays behind. */
  async leave(root: string, staging: string): Promise<void> {
    this.close();
    await rm(`${root}/${staging}`, { recursive: true, force: true });
  }

  get #lockPath(): string {
    return `${this.#staging}/lock`;
  }

  /** The names in order: another worker waits, so that what was looked at under a name is still true when it is taken. */
  async #takeLock(): Promise<() => void> {
    const end = performance.now() + LOCK_LIMIT_MS;
    while (!tryLock(this.#lock, this.#lockPath)) {
      if (performance.now() > end) throw new RepriseError("in_use", "the server's root is locked by another process");
      await Bun.sleep(LOCK_RETRY_MS);
    }
    return () => unlock(this.#lock, this.#lockPath);
  }

  async #syncContents(changes: FolderChange[]): Promise<Outcome[]> {
    const outcomes: Outcome[] = changes.map((change) => (isUpload(change) ? change.prepare() : undefined));
    if (this.#inMemory) return outcomes;
    const staged = [...changes.entries()].filter(([index, change]) => isUpload(change) && !outcomes[index]);
    const failures = await syncTogether(staged.map(([, change]) => (change as FolderUpload).fd));
    for (const [at, [index, change]] of staged.entries()) {
      if (!failures[at]) continue;
      // What the disk has of it is not known: nothing to go on with.
      (change as FolderUpload).drop();
      outcomes[index] = this.#wrap(failures[at], (change as FolderUpload).request.path);
    }
    return outcomes;
  }

  /** Of the changes from `start` to `end`. */
  async #syncFolders(folders: Folders, changes: FolderChange[], outcomes: Outcome[], start: number, end: number) {
    const failures = await syncTogether(folders.touched);
    const failure = failures.find(Boolean);
    if (!failure) return;
    for (const [offset, change] of changes.slice(start, end).entries()) {
      if (outcomes[start + offset] instanceof RepriseError) continue;
      outcomes[start + offset] = this.#wrap(failure, pathOfChange(change));
      if (isUpload(change)) change.doubt();
    }
  }

  #make(change: FolderChange, folders: Folders): Outcome {
    try {
      if (isUpload(change)) return this.#place(change, folders);
      if (change.action === "remove") return this.#remove(change.path, change.recursive, folders);
      if (change.action === "move") return this.#move(change.path, change.to, change.overwrite, folders);
      if (change.action === "clear") return this.#clear(change.path, change.etag, folders);
      if (change.action === "aside") {
        checkVersion(change, folders.parentOf(change.path).path);
        return this.#move(change.path, change.to, false, folders);
      }
      return this.#makeFolder(change.path, change.parents, folders);
    } catch (error) {
      return this.#wrap(error, pathOfChange(change));
    }
  }

  #check(put: Put): Stats | undefined {
    const folders = new Folders(this.#root, this.#folder);
    try {
      return this.#checkTarget(put, folders.parentOf(put.path).path);
    } catch (error) {
      // They are made with the file, under the lock, and synced.
      if (put.parents && error instanceof RepriseError && error.code === "not_found") return undefined;
      throw this.#wrap(error, put.path);
    } finally {
      folders.close();
    }
  }

  /** Whether an upload may take the name. Throws `not_a_file`, `exists`, `changed`, `refused`. */
  #checkTarget({ path, noClobber, etag }: Put, place: string): Stats {
    const target = lookAt(place);
    if (target?.isDirectory()) throw notAFile(path);
    // A link or device is not ours to replace.
    if (target) metaOf(target, path);
    if (target && noClobber) throw exists(path);
    if (etag !== "" && (!target || this.#etagOf(target, path) !== etag)) {
      throw new RepriseError(
        "changed",
        `changed on the server: ${quote(path)} is not the version that was to be replaced`,
      );
    }
    return target;
  }

  #etagOf(stat: NonNullable<Stats>, path: string): string {
    const etag = etagOf(stat);
    return this.#etags ? this.#etags.of(join(this.#folder, path), etag) : etag;
  }

  #place(upload: FolderUpload, folders: Folders): Meta {
    const { request, staged, fd } = upload;
    if (request.parents) this.#makeParents(request.path, folders);
    const place = folders.parentOf(request.path);
    if (request.etag !== "" || !renameIfNew(staged, place)) {
      const target = this.#checkTarget(request, place.path);
      // Who may read a file does not change with its content.
      if (target) fchmodSync(fd, Number(target.mode) & 0o777);
      renameSync(staged.path, place.path);
    }
    upload.placed = true;
    folders.touch(place.folder);
    return this.#versions ? metaOf(fstatSync(fd, { bigint: true }), request.path) : { ...request, kind: "file" };
  }

  #makeParents(path: string, folders: Folders): void {
    // A name that will be refused leaves no folders behind.
    checkName(path);
    const parent = path.slice(0, Math.max(0, path.lastIndexOf("/")));
    if (parent !== "" && !folders.has(parent)) this.#makeFolder(parent, true, folders);
  }

  #remove(path: string, recursive: boolean, folders: Folders): undefined {
    const { path: place, folder } = folders.parentOf(path);
    const target = lookAt(place);
    if (!target) throw new RepriseError("not_found", `not found: ${quote(path)}`);
    // Nobody can see a link or device from outside.
    metaOf(target, path);
    folders.touch(folder);
    if (!target.isDirectory()) return void unlinkSync(place);
    if (!recursive) throw refused(`${quote(path)} is a folder; rm -r removes it with all that is in it`);
    // It goes at once and as a whole; its content is removed beside what comes next.
    const trash = `${this.#staging}/trash-${randomUUID()}`;
    renameSync(place, trash);
    folders.forget();
    rm(trash, { recursive: true, force: true }).catch(() => {
      // The next sweep tries again.
    });
  }

  #move(path: string, to: string, overwrite: boolean, folders: Folders): undefined {
    const from = folders.parentOf(path);
    const target = folders.parentOf(to);
    const source = lookAt(from.path);
    if (!source) throw new RepriseError("not_found", `not found: ${quote(path)}`);
    metaOf(source, path);
    const there = lookAt(target.path);
    if (there?.isDirectory() && !source.isDirectory()) throw notAFile(to);
    if (there && overwrite) metaOf(there, to);
    if (overwrite) renameSync(from.path, target.path);
    else if (!renameIfNew(from, target)) throw exists(to);
    folders.touch(from.folder);
    folders.touch(target.folder);
    folders.forget();
  }

  #clear(path: string, etag: string, folders: Folders): undefined {
    const { path: place, folder } = folders.parentOf(path);
    const target = lookAt(place);
    if (!target) return;
    checkVersion({ path, etag }, place);
    folders.touch(folder);
    if (!target.isDirectory()) return void unlinkSync(place);
    folders.forget();
    rmdirSync(place);
  }

  #makeFolder(path: string, parents: boolean, folders: Folders): undefined {
    const segments = checkName(path);
    if (segments.length === 0 && !parents) throw exists(path);
    if (parents && segments.length > MAX_DEPTH) throw refused(`${quote(path)} is more than ${MAX_DEPTH} folders deep`);
    const first = parents ? 0 : segments.length - 1;
    let folder = folders.open(segments.slice(0, first), path);
    for (let depth = first; depth < segments.length; depth++) {
      const place = `${pathOf(folder)}/${segments[depth]}`;
      const there = lookAt(place);
      if (there && !parents) throw exists(path);
      if (there && !there.isDirectory()) throw new RepriseError("not_a_folder", `not a folder: ${quote(path)}`);
      if (!there) {
        mkdirSync(place);
        folders.touch(folder);
      }
      if (depth < segments.length - 1) folder = folders.openIn(folder, segments.slice(0, depth + 1), path);
    }
  }
}

function superseded(change: FolderChange): RepriseError {
  return new RepriseError("changed", `superseded: ${quote(pathOfChange(change))}`);
}

/** What uploads are held to. */
interface Limits {
  /** Of one file. */
  maxBytes: number;
  room: Room | undefined;
}

/** The space that a worker's uploads may take of the file system, all together, so that some of it stays free. */
class Room {
  readonly keepFree: number;
  readonly #folder: string;
  /** To be taken before the next look; with what is unwritten no more than LOOK_BYTES. */
  #allowed = 0;
  /** Taken and not yet written: the file system does not know of it. */
  #unwritten = 0;
  #written: PromiseWithResolvers<void> | undefined;

  constructor(folder: number, keepFree: number) {
    this.#folder = pathOf(folder);
    this.keepFree = keepFree;
  }

  /** Whether so much could be taken. */
  has(bytes: number): boolean {
    if (bytes <= this.#allowed) return true;
    const most = this.look();
    this.#allowed = Math.min(Math.max(0, LOOK_BYTES - this.#unwritten), most);
    return bytes <= most;
  }

  /** The same as `take`, once so much more may be unwritten. */
  async takeInTurn(bytes: number): Promise<boolean> {
    while (this.#unwritten > 0 && this.#unwritten + bytes > LOOK_BYTES) {
      this.#written ??= Promise.withResolvers();
      await this.#written.promise;
    }
    return this.take(bytes);
  }

  /** Takes it, for what `written` will be told of; false where there is no room. */
  take(bytes: number): boolean {
    if (!this.has(bytes)) return false;
    this.#allowed = Math.max(0, this.#allowed - bytes);
    this.#unwritten += bytes;
    return true;
  }

  written(bytes: number): void {
    this.#unwritten -= bytes;
    this.#written?.resolve();
    this.#written = undefined;
  }

  look(): number {
    const { blocks, bavail, bsize } = statfsSync(this.#folder);
    // A tmpfs without a limit, and what does not know, count no blocks at all.
    return blocks === 0 ? Number.POSITIVE_INFINITY : Math.max(0, bavail * bsize - this.keepFree - this.#unwritten);
  }
}

export class FolderUpload implements Upload {
  readonly action = "put";
  readonly request: Put;
  readonly staged: Place;
  readonly fd: number;
  readonly #queue: WriteQueue;
  readonly #wrap: Wrap;
  readonly #limits: Limits;
  /** Bytes that came and those before them, of which the last `#unwritten` are still to be written. */
  #taken: number;
  #unwritten = 0;
  /** It has its name: nothing is staged any more. */
  placed = false;

  /** Throws `in_use`, `bad_range`, `no_room`, and system errors. */
  static open(request: Put, staged: Place, wrap: Wrap, limits: Limits): FolderUpload {
    const upload = FolderUpload.#open(request, staged, wrap, limits);
    const { size, offset } = request;
    const isKnown = size !== UNKNOWN_SIZE;
    try {
      if (!isKnown || !limits.room || limits.room.has(size - offset)) return upload;
      throw noRoom(request, limits.room);
    } catch (error) {
      if (offset === 0) upload.drop();
      upload.close();
      throw error;
    }
  }

  static #open(request: Put, staged: Place, wrap: Wrap, limits: Limits): FolderUpload {
    if (request.id === "" && request.offset > 0) throw notHeld(request);
    // A name that nobody else can have needs no lock.
    if (request.id === "") return new FolderUpload(request, staged, create(staged), wrap, limits);
    const fd = openLocked(staged.path);
    try {
      const { size } = fstatSync(fd);
      if (size < request.offset) {
        if (size === 0) removeIfThere(staged.path);
        throw notHeld(request);
      }
      ftruncateSync(fd, request.offset);
      return new FolderUpload(request, staged, fd, wrap, limits);
    } catch (error) {
      unlock(fd, staged.path);
      closeSync(fd);
      throw error;
    }
  }

  private constructor(request: Put, staged: Place, fd: number, wrap: Wrap, limits: Limits) {
    this.#wrap = wrap;
    this.#limits = limits;
    this.#taken = request.offset;
    this.request = request;
    this.staged = staged;
    this.fd = fd;
    const wrapHere = (error: unknown) => wrap(error, request.path);
    this.#queue = new WriteQueue(fd, { seekable: true, wrap: wrapHere, bytes: request.offset });
  }

  get bytes(): number {
    return this.#queue.bytes;
  }

  async append(chunk: Uint8Array, crc32: number, free: Release): Promise<void> {
    const { length } = chunk;
    this.#taken += length;
    if (this.#taken > this.#limits.maxBytes) {
      this.drop();
      throw tooLarge(this.request, this.#limits.maxBytes);
    }
    const { room } = this.#limits;
    if (!room) return this.#queue.append(chunk, crc32, free);
    if (!(await room.takeInTurn(length))) throw noRoom(this.request, room);
    this.#unwritten += length;
    return this.#queue.append(chunk, crc32, (written) => {
      this.#leaveRoom(length);
      free(written);
    });
  }

  /** What was taken is written, or never will be. */
  #leaveRoom(bytes: number): void {
    this.#limits.room?.written(bytes);
    this.#unwritten -= bytes;
  }

  write(content: Uint8Array): void {
    const { room } = this.#limits;
    const bytes = Math.max(1, Math.ceil(content.length / BLOCK_BYTES)) * BLOCK_BYTES;
    if (room && !room.take(bytes)) throw noRoom(this.request, room);
    try {
      for (let at = 0; at < content.length; ) at += writeSync(this.fd, content, at, content.length - at, at);
    } catch (error) {
      throw this.#wrap(error, this.request.path);
    } finally {
      room?.written(bytes);
    }
  }

  /** It is with the operating system. */
  settle(): Promise<void> {
    return this.#queue.settle();
  }

  /** Before it is synced: its time. */
  prepare(): RepriseError | undefined {
    try {
      setTime(this.fd, this.request.mtime);
    } catch (error) {
      return this.#wrap(error, this.request.path);
    }
  }

  /**
   * It has its name, and yet may be gone after a crash: with another time nobody takes it for what was to be put, and does
   * not send it again.
   */
  doubt(): void {
    try {
      setTime(this.fd, Date.now() * 1000);
    } catch {
      // The disk takes nothing any more; the failure is told all the same.
    }
  }

  drop(): void {
    if (!this.placed) removeIfThere(this.staged.path);
    this.placed = true;
  }

  close(): void {
    this.#leaveRoom(this.#unwritten);
    try {
      if (this.request.id === "") this.drop();
      else unlock(this.fd, this.staged.path);
    } finally {
      closeSync(this.fd);
    }
  }
}

// ---------------------------------------------------------------------------------------------------- names

/** A name in an open folder; `path` says the same in one. */
interface Place {
  folder: number;
  name: string;
  path: string;
}

function create({ folder, name, path }: Place): number {
  const fd = libc()?.createAt(folder, name, 0o666) ?? -1;
  // The plain way says why it is not possible.
  return fd >= 0 ? fd : openSync(path, NEW_FLAGS, 0o666);
}

function isUpload(change: FolderChange): change is FolderUpload {
  return change.action === "put";
}

function pathOfChange(change: FolderChange): string {
  return isUpload(change) ? change.request.path : change.path;
}

/** Folders that all groups of a process have open. */
let openFolders = 0;

/** The folders that changes made together have to do with, each opened once. */
class Folders {
  readonly #root: number;
  readonly #folder: string;
  readonly #open: number[] = [];
  readonly #known = new Map<string, number>();
  readonly #touched = new Set<number>();

  /** Of a folder beneath `root`, or "" for itself. */
  constructor(root: number, folder: string) {
    this.#root = root;
    this.#folder = folder;
  }

  /** The folder that a name is in, and the name as a path beneath its descriptor. Throws `not_found`, `bad_name`, `refused`. */
  parentOf(path: string): Place {
    const segments = checkName(path);
    const name = segments.pop();
    if (name === undefined) throw refused("the served folder itself cannot be changed");
    const folder = this.open(segments, path);
    return { folder, name, path: `${pathOf(folder)}/${name}` };
  }

  /** Opens a folder, for the sake of what is wanted in it. */
  open(segments: string[], wanted: string): number {
    const path = segments.join("/");
    const known = this.#known.get(path);
    if (known !== undefined) return known;
    const at = locateParent(this.#root, this.#folder, path, wanted);
    try {
      return this.#keep(path, pathOf(at), wanted);
    } finally {
      closeSync(at);
    }
  }

  /** The same of one that is in an open one: a path of many segments is not gone through again for each of them. */
  openIn(folder: number, segments: string[], wanted: string): number {
    const path = segments.join("/");
    const place = `${pathOf(folder)}/${segments.at(-1)}`;
    return this.#known.get(path) ?? this.#keep(path, place, wanted, constants.O_NOFOLLOW);
  }

  /** Whether a folder was met already, and so is there. */
  has(path: string): boolean {
    return this.#known.has(path);
  }

  touch(folder: number): void {
    this.#touched.add(folder);
  }

  /** A folder may have gone from where it was. */
  forget(): void {
    this.#known.clear();
  }

  get touched(): number[] {
    return [...this.#touched];
  }

  /** No further change should be made before these are synced and closed. */
  get areMany(): boolean {
    return openFolders >= MAX_OPEN_FOLDERS;
  }

  close(): void {
    openFolders -= this.#open.length;
    for (const fd of this.#open) closeSync(fd);
  }

  #keep(path: string, place: string, wanted: string, flags = 0): number {
    try {
      // Not only a place, as for looking: it is to be synced.
      const fd = openSync(place, constants.O_RDONLY | constants.O_DIRECTORY | flags);
      openFolders++;
      this.#open.push(fd);
      this.#known.set(path, fd);
      return fd;
    } catch (error) {
      if (errorCode(error) === "ENOTDIR") throw notAFolder(path, wanted);
      throw error;
    }
  }
}

/** The segments of a name that clients may give. Throws `bad_name`, `refused`. */
export function checkName(path: string): string[] {
  const segments = splitPath(path);
  if (segments.some(isHidden)) throw refused(`${quote(path)} is a name that the server keeps to itself`);
  return segments;
}

function locateParent(root: number, folder: string, path: string, wanted: string): number {
  try {
    return locateIn(root, folder, path);
  } catch (error) {
    if (!(error instanceof RepriseError) || error.code !== "not_found") throw error;
    if (path === "") throw new RepriseError("not_found", `not found: ${quote(wanted)}`);
    throw new RepriseError("not_found", `not found: the folder ${quote(path)} for ${quote(wanted)}; mkdir -p makes it`);
  }
}

type Stats = ReturnType<typeof lookAt>;

function lookAt(place: string) {
  return lstatSync(place, { bigint: true, throwIfNoEntry: false });
}

/** Of the file that an upload is to become: all, or what the server is said to hold already. */
function bytesKnownOf({ size, offset }: Put): number {
  return size === UNKNOWN_SIZE ? offset : size;
}

/** Throws `changed` where there is another version than that; a folder has none. */
function checkVersion({ path, etag }: { path: string; etag: string }, place: string): void {
  const target = lookAt(place);
  const found = target && metaOf(target, path).etag;
  if (found !== etag) throw new RepriseError("changed", `changed on the server: ${quote(path)}`);
}

/** rename(2) that never replaces; false where something has the name. */
function renameIfNew(from: Place, to: Place): boolean {
  if (libc()?.renameNew(from.folder, from.name, to.folder, to.name) === 0) return true;
  // Not there, not known to the file system, or refused: a look and a plain rename say which. Without the call, the lock
  // keeps at least other clients from coming between.
  if (lookAt(to.path)) return false;
  renameSync(from.path, to.path);
  return true;
}

function isOld(path: string, now: number): boolean {
  const stat = lstatSync(path, { throwIfNoEntry: false });
  return stat !== undefined && now - stat.ctimeMs >= KEEP_MS;
}

/** Unless somebody is just going on with it. */
function removeUpload(path: string): void {
  if (!lstatSync(path, { throwIfNoEntry: false })) return;
  let fd: number;
  try {
    fd = openLocked(path);
  } catch (error) {
    if (error instanceof Held) return;
    throw error;
  }
  try {
    removeIfThere(path);
  } finally {
    unlock(fd, path);
    closeSync(fd);
  }
}

// ---------------------------------------------------------------------------------------------------- errors

export function refused(text: string): RepriseError {
  return new RepriseError("refused", `refused: ${text}`);
}

export function exists(path: string): RepriseError {
  return new RepriseError("exists", `${quote(path)} exists already`);
}

export function notHeld({ offset, path }: Put): RepriseError {
  return new RepriseError("bad_range", `the server does not hold ${offset} bytes of ${quote(path)}`);
}

export function tooLarge({ path }: Put, maxBytes: number): RepriseError {
  return new RepriseError(
    "too_large",
    `refused: ${quote(path)} is larger than the ${inUnits(maxBytes)} that the server takes (--max-upload)`,
  );
}

/** What to do about it, for who puts a file. */
export const PUT_AGAIN = "; make room there and put it again";

function noRoom({ path }: Put, { keepFree }: Room): RepriseError {
  return new RepriseError(
    "no_room",
    `no room on the server for ${quote(path)}, of which it keeps ${inUnits(keepFree)} free (--keep-free)${PUT_AGAIN}`,
  );
}

/** As the options take it: `64M`, or bytes where that would not be exact. */
function inUnits(bytes: number): string {
  const power = [4, 3, 2, 1].find((power) => bytes % 1024 ** power === 0);
  return power ? `${bytes / 1024 ** power}${"KMGT"[power - 1]}` : `${bytes} bytes`;
}

export function notAFile(path: string): RepriseError {
  return new RepriseError("not_a_file", `not a file: ${quote(path)} is a folder`);
}

export function notAFolder(path: string, wanted: string): RepriseError {
  return new RepriseError("not_a_folder", `not a folder: ${quote(path)}, and so there is no ${quote(wanted)}`);
}

/** What went wrong in words for the peer: no path of the machine, no number. */
function errorOf(error: unknown, path: string): RepriseError {
  if (error instanceof RepriseError) return error;
  if (error instanceof Held) {
    return new RepriseError("in_use", `${quote(path)} is still being received over another connection`, error);
  }
  const name = quote(path);
  switch (errorCode(error)) {
    case "ENOSPC":
    case "EDQUOT":
      return new RepriseError("no_room", `no room on the server for ${name}${PUT_AGAIN}`, error);
    case "EFBIG":
      return new RepriseError("no_room", `${name} is larger than the server's file system allows`, error);
    case "ENOENT":
      return new RepriseError("not_found", `not found: ${name}`, error);
    case "EEXIST":
    case "ENOTEMPTY":
      return new RepriseError("exists", `${name}: something of the new name exists already, and is not empty`, error);
    case "EISDIR":
      return notAFile(path);
    case "ENOTDIR":
      return new RepriseError("not_a_folder", `not a folder: a part of ${name}`, error);
    case "EINVAL":
      return new RepriseError(
        "refused",
        `refused: the server's file system takes no such name or move: ${name}`,
        error,
      );
    case "ENAMETOOLONG":
    case "EILSEQ":
      return new RepriseError("bad_name", `refused: the server's file system takes no such name: ${name}`, error);
    case "EXDEV":
      return new RepriseError("refused", `refused: ${name} is on another file system of the server`, error);
    case "EROFS":
    case "EACCES":
    case "EPERM":
    case "EBUSY":
      return new RepriseError("refused", `refused: the server may not write ${name}`, error);
    default:
      return new RepriseError("failed", `the server could not write ${name}`, error);
  }
}
