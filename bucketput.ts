/**
 * The writing side of a root on S3: see bucket.ts, and changes.ts for what is promised.
 *
 * An upload goes to S3 as it comes, and is seen when its turn has come and it is complete: see bucketupload.ts. What is left
 * of those that nobody goes on with is swept after a week.
 *
 * S3 has no changes of several objects at once. A folder is removed and moved object by object, and a move is a copy and
 * a removal: who is cut in the middle has both, and the same move again goes on. Nothing is locked; where two want one name
 * under a condition, S3 decides (`If-None-Match`, `If-Match`), or a look just before where it knows no such thing, as for
 * multipart uploads and copies.
 */
import { type Bucket, Budget, hasKeysBeneath, keyFor, MAX_KEY_BYTES, textOfTime } from "./bucket.ts";
import {
  BucketUpload,
  isConflict,
  MAX_PART_BYTES,
  MAX_PARTS,
  readState,
  type Shared,
  stateKey,
} from "./bucketupload.ts";
import {
  type Change,
  type Changes,
  checkName,
  exists,
  notAFile,
  notAFolder,
  notHeld,
  type Outcome,
  refused,
  tooLarge,
  type Upload,
} from "./changes.ts";
import { ERRORS, type Meta, type Put, quote, RepriseError, UNKNOWN_SIZE } from "./protocol.ts";
import { type ListedObject, type ListPage, type ObjectInfo, type Part, type PutConditions, S3Error } from "./s3.ts";
import { join, type MaybePromise } from "./storage.ts";

const MIB = 1024 * 1024;
/** Parts of uploads of one worker that come or are sent on; further ones wait. One more may always. */
const WRITE_BUDGET_BYTES = 64 * MIB;
/** What is held of whole small files until their turn; the others go on as parts. */
const HOLD_BUDGET_BYTES = 32 * MIB;
/** Changes that do not depend on each other, made side by side; and copies of a folder's objects. */
const MAX_TOGETHER = 16;
/** What one request copies. */
const MAX_COPY_BYTES = 5 * 1024 * MIB;
const COPY_PART_BYTES = 512 * MIB;
/** What an upload that was given up leaves is kept this long. */
const KEEP_MS = 7 * 24 * 3600 * 1000;

export function openBucketChanges(bucket: Bucket): Changes {
  const shared = {
    bucket,
    parts: new Budget(WRITE_BUDGET_BYTES),
    held: new Budget(HOLD_BUDGET_BYTES),
    uploads: new Map(),
  };
  return new BucketChanges(shared, "");
}

class BucketChanges implements Changes {
  readonly #shared: Shared;
  readonly #folder: string;

  constructor(shared: Shared, folder: string) {
    this.#shared = shared;
    this.#folder = folder;
  }

  beneath(folder: string): Changes {
    return new BucketChanges(this.#shared, join(this.#folder, folder));
  }

  receive(put: Put, isSmall: boolean): MaybePromise<Upload> {
    const { bucket } = this.#shared;
    const key = this.#keyOf(put.path);
    if (put.id !== "" && !isId(put.id)) throw refused("not an upload id");
    const known = put.size === UNKNOWN_SIZE ? put.offset : put.size;
    if (known > Math.min(bucket.maxUpload, MAX_PARTS * MAX_PART_BYTES)) {
      if (put.id !== "") this.#forget(put.id).catch(() => {});
      throw tooLarge(put, Math.min(bucket.maxUpload, MAX_PARTS * MAX_PART_BYTES));
    }
    if (isSmall && put.offset === 0) return new BucketUpload(this.#shared, put, key, undefined);
    return this.#wrapped(put.path, () => this.#receive(put, key));
  }

  async #receive(put: Put, key: string): Promise<Upload> {
    await this.#checkTarget(put, new Folders(this.#shared.bucket, this.#folder));
    if (put.id === "" && put.offset > 0) throw notHeld(put);
    if (put.id === "") return new BucketUpload(this.#shared, put, key, undefined);
    const { uploads } = this.#shared;
    const other = uploads.get(put.id);
    if (other && !other.isClosed) {
      throw new RepriseError("in_use", `${quote(put.path)} is still being received over another connection`);
    }
    await other?.closed;
    const held = await readState(this.#shared.bucket, put.id);
    const usable = held && held.state.key === key && held.state.mtime === put.mtime ? held : undefined;
    if (put.offset > 0 && !usable) throw notHeld(put);
    if (held && (!usable || put.offset === 0)) await this.#forget(put.id);
    return new BucketUpload(this.#shared, put, key, put.offset > 0 ? usable : undefined);
  }

  async apply(changes: Change[]): Promise<Outcome[]> {
    const outcomes: Outcome[] = [];
    const folders = new Folders(this.#shared.bucket, this.#folder);
    for (let at = 0; at < changes.length; ) {
      const end = endOfIndependent(changes, at);
      const made = await Promise.all(changes.slice(at, end).map((change) => this.#make(change, folders)));
      outcomes.push(...made);
      at = end;
      // Where S3 is gone, what is behind is not tried: it is asked for again, all of it.
      const over = made.find((outcome) => outcome instanceof RepriseError && ERRORS[outcome.code].closes);
      if (over) while (at < changes.length) outcomes[at++] = over;
    }
    return outcomes;
  }

  async #make(change: Change, folders: Folders): Promise<Outcome> {
    const path = change.action === "put" ? change.request.path : change.path;
    try {
      return await this.#wrapped(path, () => this.#makeOne(change, folders));
    } catch (error) {
      if (error instanceof RepriseError) return error;
      throw error;
    }
  }

  async #makeOne(change: Change, folders: Folders): Promise<Outcome> {
    switch (change.action) {
      case "put":
        return this.#place(change as BucketUpload, folders);
      case "remove":
        return this.#remove(change.path, change.recursive, folders);
      case "move":
        return this.#move(change.path, change.to, change.overwrite, folders);
      case "mkdir":
        return this.#makeFolder(change.path, change.parents, folders);
      default:
        throw new Error("Only the keeper of a folder corrects");
    }
  }

  async *sums(id: string): AsyncGenerator<{ length: number; crc32: number }> {
    if (!isId(id)) return;
    const { bucket, uploads } = this.#shared;
    const upload = uploads.get(id);
    if (upload?.isClosed) await upload.closed;
    const held = await this.#wrapped("", () => readState(bucket, id));
    for (const [length, , crc32] of held?.state.parts ?? []) yield { length, crc32 };
  }

  async sweep(now = Date.now()): Promise<void> {
    try {
      await this.#sweep(now);
    } catch (error) {
      // The next one finds it, too.
      if (!(error instanceof S3Error)) throw error;
    }
  }

  async #sweep(now: number): Promise<void> {
    const { bucket } = this.#shared;
    const { s3, prefix } = bucket;
    const isOld = (ms: number) => now - ms >= KEEP_MS;
    const goneOnWith: string[] = [];
    let token: string | undefined;
    do {
      const page = await s3.list(`${prefix}.reprise/`, { token });
      for (const { key, modified } of page.objects) {
        if (key === undefined) continue;
        const id = key.split("/put-").pop()!;
        if (!isOld(Date.parse(modified)) && isId(id)) goneOnWith.push(id);
        if (!isOld(Date.parse(modified))) continue;
        // What cannot be removed keeps nothing else from it.
        await (isId(id) ? this.#forget(id) : s3.remove(key)).catch(() => {});
      }
      token = page.next;
    } while (token !== undefined);
    let kept: Set<string> | undefined;
    for await (const { key, uploadId, begunMs } of s3.uploads(prefix)) {
      if (key === undefined || !isOld(begunMs)) continue;
      kept ??= await this.#uploadsOf(goneOnWith);
      if (!kept.has(uploadId)) await s3.abortUpload(key, uploadId).catch(() => {});
    }
  }

  /** Begun long ago, perhaps, and gone on with since. */
  async #uploadsOf(ids: string[]): Promise<Set<string>> {
    const uploads = new Set<string>();
    for (const id of ids) uploads.add((await readState(this.#shared.bucket, id))?.state.uploadId ?? "");
    return uploads;
  }

  close(): void {}

  /** Nobody goes on with that upload. */
  async #forget(id: string): Promise<void> {
    const { bucket } = this.#shared;
    const held = await readState(bucket, id);
    if (!held) return;
    await bucket.s3.abortUpload(held.state.key, held.state.uploadId);
    await bucket.s3.remove(stateKey(bucket, id));
  }

  // ------------------------------------------------------------------------------------------------ changes

  /** What stands against a put. Throws `not_a_file`, `exists`, `changed`, `not_found`, `not_a_folder`. */
  async #checkTarget({ path, noClobber, etag, parents }: Put, folders: Folders): Promise<void> {
    const key = this.#keyOf(path);
    const { bucket } = this.#shared;
    const needsLook = noClobber || etag !== "";
    const [, isFolder, info] = await Promise.all([
      folders.checkParent(path, parents),
      hasKeysBeneath(bucket, key),
      needsLook ? bucket.s3.head(key) : undefined,
    ]);
    if (isFolder && !info) throw notAFile(path);
    if (noClobber && info) throw exists(path);
    if (etag !== "" && info?.etag !== etag) throw notThatVersion(path);
  }

  async #place(upload: BucketUpload, folders: Folders): Promise<Meta> {
    const { request } = upload;
    const { bucket } = this.#shared;
    await this.#checkTarget(request, folders);
    const { noClobber, etag } = request;
    const conditions = { ifNoneMatch: noClobber ? "*" : undefined, ifMatch: etag || undefined } as const;
    try {
      const meta = await upload.place(conditions);
      bucket.noteWritten();
      folders.note(request.path, "file");
      return meta;
    } catch (error) {
      if (!isConflict(error)) throw error;
      throw noClobber ? exists(request.path) : notThatVersion(request.path);
    }
  }

  async #remove(path: string, recursive: boolean, folders: Folders): Promise<undefined> {
    const key = this.#nameOf(path);
    const { bucket } = this.#shared;
    const isFile = (await bucket.s3.head(key)) !== undefined;
    if (!isFile && !(await hasKeysBeneath(bucket, key))) throw notFound(path);
    if (!isFile && !recursive) throw refused(`${quote(path)} is a folder; rm -r removes it with all that is in it`);
    await folders.keepParent(path);
    folders.forget();
    if (isFile) return bucket.s3.remove(key) as Promise<undefined>;
    await this.#removeBeneath(`${key}/`);
  }

  async #removeBeneath(prefix: string): Promise<void> {
    const { s3 } = this.#shared.bucket;
    for (;;) {
      // From the start each time: what is behind moves up.
      const { objects, next } = await s3.list(prefix);
      const keys = objects.flatMap(({ key }) => key ?? []);
      if (keys.length < objects.length) throw refused("a key in it is no UTF-8, and this server cannot name it");
      if (keys.length > 0) await s3.removeAll(keys);
      if (next === undefined) return;
    }
  }

  async #move(path: string, to: string, overwrite: boolean, folders: Folders): Promise<undefined> {
    const [from, target] = [this.#nameOf(path), this.#nameOf(to)];
    const { bucket } = this.#shared;
    await folders.checkParent(to, false);
    const source = await bucket.s3.head(from);
    if (!source && !(await hasKeysBeneath(bucket, from))) throw notFound(path);
    const [there, isFolder] = await Promise.all([bucket.s3.head(target), hasKeysBeneath(bucket, target)]);
    if (isFolder && !there && source) throw notAFile(to);
    const isCut = (there !== undefined || isFolder) && (await this.#isCutMove(from, target, source, there));
    if ((there || isFolder) && !overwrite && !isCut) throw exists(to);
    if (from === target) return;
    if (`${target}/`.startsWith(`${from}/`)) throw refused(`${quote(path)} cannot be moved into itself`);
    await folders.keepParent(path);
    folders.forget();
    if (source) {
      if (!isCut) await this.#copyUnless(overwrite, from, source, target, to);
      // Whatever has taken its place meanwhile is not what was moved.
      const still = await bucket.s3.head(from);
      if (still?.etag === source.etag) await bucket.s3.remove(from);
      return;
    }
    if (there) throw notAFolder(to, to);
    if (isFolder && !isCut && !(await this.#isOnlyMarker(`${target}/`))) throw exists(to);
    await this.#moveBeneath(`${from}/`, `${target}/`, isCut);
  }

  /**
   * Whether what is there is what a move that was cut in its middle has left, so that it may be gone on with. Of a folder
   * that is so where all that is at its new place was copied from the old one, or all that is left at the old one has its
   * copy: then nothing is replaced, and nothing removed that is not there a second time.
   */
  async #isCutMove(from: string, to: string, source?: ObjectInfo, there?: ObjectInfo): Promise<boolean> {
    if (from === to) return false;
    if (source || there) return source !== undefined && there !== undefined && isCopy(there, source);
    const [old, copies] = [`${from}/`, `${to}/`];
    return (
      (await this.#areAll(copies, (key) => this.#hasCopy(old + key.slice(copies.length), key))) ||
      this.#areAll(old, (key) => this.#hasCopy(key, copies + key.slice(old.length)))
    );
  }

  /** Whether that is so of all objects of a folder, of which one at least is a file. */
  async #areAll(folder: string, isSo: (key: string) => Promise<boolean>): Promise<boolean> {
    const { s3 } = this.#shared.bucket;
    let files = 0;
    let token: string | undefined;
    do {
      const { objects, next }: ListPage = await s3.list(folder, { token });
      token = next;
      for (let at = 0; at < objects.length; at += MAX_TOGETHER) {
        const some = objects.slice(at, at + MAX_TOGETHER).map(({ key }) => key);
        const areSo = await Promise.all(some.map((key) => key !== undefined && isSo(key)));
        if (areSo.includes(false)) return false;
        files += some.filter((key) => !key!.endsWith("/")).length;
      }
    } while (token !== undefined);
    return files > 0;
  }

  async #hasCopy(from: string, to: string): Promise<boolean> {
    const { s3 } = this.#shared.bucket;
    const [info, there] = await Promise.all([s3.head(from), s3.head(to)]);
    return info !== undefined && there !== undefined && isCopy(there, info);
  }

  async #isOnlyMarker(prefix: string): Promise<boolean> {
    const { objects } = await this.#shared.bucket.s3.list(prefix, { max: 2 });
    return objects.every(({ key }) => key === prefix);
  }

  /** All copies are there before the first original goes, and no other does: more may have come meanwhile. */
  async #moveBeneath(from: string, to: string, isCut: boolean): Promise<void> {
    const { s3 } = this.#shared.bucket;
    const copied = new Set<bigint>();
    let token: string | undefined;
    do {
      const { objects, next } = await s3.list(from, { token });
      token = next;
      for (const { key } of objects) {
        const target = key === undefined ? undefined : to + key.slice(from.length);
        if (target === undefined || Buffer.byteLength(target) > MAX_KEY_BYTES || /(^|\/)\.\.?(\/|$)/.test(target)) {
          throw refused("something in it has a name that cannot be moved there");
        }
      }
      for (let at = 0; at < objects.length; at += MAX_TOGETHER) {
        const some = objects.slice(at, at + MAX_TOGETHER).map(({ key }) => key!);
        await Promise.all(some.map((key) => this.#copyIfThere(key, to + key.slice(from.length), copied, isCut)));
      }
    } while (token !== undefined);
    await this.#removeCopied(from, copied);
  }

  async #copyIfThere(from: string, to: string, copied: Set<bigint>, isCut: boolean): Promise<void> {
    const { s3 } = this.#shared.bucket;
    const [info, there] = await Promise.all([s3.head(from), isCut ? s3.head(to) : undefined]);
    if (!info) return;
    if (!there || !isCopy(there, info)) await this.#copy(from, info, to);
    copied.add(versionOf(from, info.etag));
  }

  async #removeCopied(prefix: string, copied: Set<bigint>): Promise<void> {
    const { s3 } = this.#shared.bucket;
    for (let startAfter: string | undefined = ""; startAfter !== undefined; ) {
      const { objects, next }: ListPage = await s3.list(prefix, startAfter === "" ? {} : { startAfter });
      const isCopied = ({ key, etag }: ListedObject) => key !== undefined && copied.has(versionOf(key, etag));
      const keys = objects.filter(isCopied).map(({ key }) => key!);
      if (keys.length > 0) await s3.removeAll(keys);
      startAfter = next === undefined ? undefined : objects.findLast(({ key }) => key !== undefined)?.key;
    }
  }

  /** Unless something is there by now that is not to be replaced: S3 itself looks, where it can. Throws `exists`. */
  async #copyUnless(overwrite: boolean, from: string, source: ObjectInfo, to: string, path: string): Promise<void> {
    const { s3 } = this.#shared.bucket;
    if (overwrite) return this.#copy(from, source, to);
    try {
      await this.#copy(from, source, to, { ifNoneMatch: "*" });
    } catch (error) {
      // A gateway that knows no such condition: it was looked for just before.
      if (error instanceof S3Error && error.status === 501) return this.#copy(from, source, to);
      if (!isConflict(error)) throw error;
      const there = await s3.head(to);
      if (!there) throw error;
      // A try before it may have done it, unheard.
      if (!error.isRetried || !isSame(source, there)) throw exists(path);
    }
  }

  async #copy(from: string, info: ObjectInfo, to: string, conditions: PutConditions = {}): Promise<void> {
    const { etag, size, mtime, modifiedMs } = info;
    const { s3 } = this.#shared.bucket;
    if (size <= MAX_COPY_BYTES) return s3.copy(from, etag, to, conditions);
    const uploadId = await s3.createUpload(to, mtime ?? textOfTime(modifiedMs * 1000));
    try {
      const parts: Part[] = [];
      for (let at = 0; at < size; at += COPY_PART_BYTES) {
        const [number, length] = [parts.length + 1, Math.min(COPY_PART_BYTES, size - at)];
        parts.push({ number, etag: await s3.copyPart(to, uploadId, number, from, etag, at, length) });
      }
      await s3.completeUpload(to, uploadId, parts, conditions);
    } catch (error) {
      await s3.abortUpload(to, uploadId).catch(() => {});
      throw error;
    }
  }

  async #makeFolder(path: string, parents: boolean, folders: Folders): Promise<undefined> {
    const segments = checkName(path);
    if (segments.length === 0) {
      if (parents) return;
      throw exists(path);
    }
    const key = this.#keyOf(path);
    const { bucket } = this.#shared;
    await folders.checkParent(path, parents);
    const [info, isThere] = await Promise.all([bucket.s3.head(key), hasKeysBeneath(bucket, key)]);
    if ((info || isThere) && !parents) throw exists(path);
    if (info) throw new RepriseError("not_a_folder", `not a folder: ${quote(path)}`);
    if (!isThere) await bucket.s3.put(`${key}/`, "");
    folders.note(path, "folder");
  }

  /** Of what is to be changed; not the folder itself. */
  #nameOf(path: string): string {
    if (checkName(path).length === 0) throw refused("the served folder itself cannot be changed");
    return this.#keyOf(path);
  }

  /** Throws `bad_name`, `refused`. */
  #keyOf(path: string): string {
    if (checkName(path).length === 0) throw refused("the served folder itself cannot be changed");
    const key = keyFor(this.#shared.bucket, this.#folder, path);
    // With a "/" behind it where it is a folder.
    if (Buffer.byteLength(key) < MAX_KEY_BYTES) return key;
    throw new RepriseError("bad_name", `refused: the server's storage takes no name as long as ${quote(path, 60)}`);
  }

  async #wrapped<T>(path: string, work: () => Promise<T>): Promise<T> {
    try {
      return await work();
    } catch (error) {
      throw this.#shared.bucket.errorOf(error, path);
    }
  }
}

/**
 * The same content, and written later: of the two, that is the copy. Were each taken for the other's, a move and a move back,
 * as by who has thought better of it while the first goes on, would both find a copy and remove the original, until there is
 * none. What was written within one second cannot be told apart, and is not taken for a copy either.
 */
function isCopy(copy: ObjectInfo, original: ObjectInfo): boolean {
  return isSame(copy, original) && copy.modifiedMs > original.modifiedMs;
}

/** The same content, with the same time of the file. */
function isSame(one: ObjectInfo, other: ObjectInfo): boolean {
  return one.etag === other.etag && one.size === other.size && one.mtime === other.mtime;
}

/** Of an object, in a few bytes: a folder may have millions. */
function versionOf(key: string, etag: string): bigint {
  return Bun.hash.xxHash64(`${etag} ${key}`);
}

function isId(id: string): boolean {
  return /^[0-9a-f]{32}$/.test(id);
}

/** The end of those, from `start` on, that may be made in any order: puts to names of which none is in another. */
function endOfIndependent(changes: Change[], start: number): number {
  const taken = new Set<string>();
  const above = new Set<string>();
  let end = start;
  for (; end < changes.length && end - start < MAX_TOGETHER; end++) {
    const change = changes[end]!;
    if (change.action !== "put") break;
    const { path } = change.request;
    const folders = foldersAbove(path);
    if (taken.has(path) || above.has(path) || folders.some((folder) => taken.has(folder))) break;
    taken.add(path);
    for (const folder of folders) above.add(folder);
  }
  return Math.max(end, start + 1);
}

/** From the outermost to the one that it is in. */
function foldersAbove(path: string): string[] {
  const names = path.split("/");
  return names.slice(1).map((_, index) => names.slice(0, index + 1).join("/"));
}

/** The folders that changes made together have to do with, each asked for once. */
class Folders {
  readonly #bucket: Bucket;
  readonly #folder: string;
  readonly #known = new Map<string, Promise<"folder" | "file" | "nothing">>();

  constructor(bucket: Bucket, folder: string) {
    this.#bucket = bucket;
    this.#folder = folder;
  }

  /** Throws `not_found` where there is no such folder, unless it is to be made; `not_a_folder` where there is a file. */
  async checkParent(path: string, isMade: boolean): Promise<void> {
    const above = foldersAbove(path);
    const asked = isMade ? above : above.slice(-1);
    const kinds = await Promise.all(asked.map((folder) => this.#kindOf(folder)));
    const file = asked[kinds.indexOf("file")];
    if (file !== undefined) throw notAFolder(file, path);
    if (isMade || kinds[0] !== "nothing") return;
    const text = `not found: the folder ${quote(asked[0]!)} for ${quote(path)}; mkdir -p makes it`;
    throw new RepriseError("not_found", text);
  }

  #kindOf(path: string): Promise<"folder" | "file" | "nothing"> {
    const known = this.#known.get(path);
    if (known) return known;
    const kind = this.#look(path);
    kind.catch(() => this.#known.delete(path));
    this.#known.set(path, kind);
    return kind;
  }

  async #look(path: string): Promise<"folder" | "file" | "nothing"> {
    const key = keyFor(this.#bucket, this.#folder, path);
    const [info, isFolder] = await Promise.all([this.#bucket.s3.head(key), hasKeysBeneath(this.#bucket, key)]);
    return info ? "file" : isFolder ? "folder" : "nothing";
  }

  /** The folder that something goes from stays, though it may have been the last in it. */
  async keepParent(path: string): Promise<void> {
    const parent = join(this.#folder, foldersAbove(path).at(-1) ?? "");
    // What is served as a whole is there anyway.
    if (parent === "") return;
    const { s3 } = this.#bucket;
    const prefix = `${keyFor(this.#bucket, "", parent)}/`;
    const key = keyFor(this.#bucket, this.#folder, path);
    const { objects } = await s3.list(prefix, { max: 2 });
    const isOther = (found: string | undefined) => found !== key && !found?.startsWith(`${key}/`);
    if (objects.some((object) => isOther(object.key))) return;
    // U+10FFFF is behind all that is in a folder.
    const behind = await s3.list(prefix, { max: 1, startAfter: `${key}/\u{10ffff}` });
    if (behind.objects.length === 0) await s3.put(prefix, "");
  }

  /** There is one now, and with it the folders that it is in. */
  note(path: string, kind: "folder" | "file"): void {
    this.#known.set(path, Promise.resolve(kind));
    for (const folder of foldersAbove(path)) this.#known.set(folder, Promise.resolve("folder"));
  }

  /** A folder may have gone from where it was. */
  forget(): void {
    this.#known.clear();
  }
}

// ---------------------------------------------------------------------------------------------------- errors

function notThatVersion(path: string): RepriseError {
  return new RepriseError(
    "changed",
    `changed on the server: ${quote(path)} is not the version that was to be replaced`,
  );
}

function notFound(path: string): RepriseError {
  return new RepriseError("not_found", `not found: ${quote(path)}`);
}
