/**
 * A root on S3: a bucket, or what is beneath a prefix of it, as the files and folders of a server.
 *
 * An object is a file, under its path behind the prefix. S3 has no folders: there is one wherever a key goes on behind a
 * "/", and a key that ends in "/", without content, is what keeps one without files. The etag is S3's own; the time is
 * in `x-amz-meta-mtime`, in seconds as other tools have it there, else that of the upload. `.reprise/` has what is
 * known of uploads that are under way. Nothing is kept on this machine: any number of servers may serve one bucket.
 *
 * A file is read by ranges under `If-Match`, so it is one version or `changed`. What is asked for ahead, by all downloads
 * of a worker together, has a budget: a few of them get much of it, many get little each.
 *
 * Not shown are keys that no path can name. Where a key is a file and has others behind it, the file is shown.
 */
import type { Cache, Origin } from "./cache.ts";
import {
  type Entry,
  type ErrorCode,
  MAX_SEGMENT_BYTES,
  type Meta,
  quote,
  RepriseError,
  splitPath,
  UNKNOWN_SIZE,
} from "./protocol.ts";
import {
  type ListedObject,
  type ListPage,
  type ObjectInfo,
  type RequestLimits,
  S3,
  S3Error,
  type S3Settings,
} from "./s3.ts";
import { isHidden, join, type OpenFile, type Root } from "./storage.ts";

export const MAX_KEY_BYTES = 1024;
/** What downloads of a worker may have asked for and not yet sent, except for the little that each must have. */
const READ_BUDGET_BYTES = 32 * 1024 * 1024;
/** Of one download. */
const MAX_AHEAD_BYTES = 16 * 1024 * 1024;
/** A piece that is asked for at once; the last is for when the budget is used up. */
const MAX_PIECE_BYTES = 8 * 1024 * 1024;
const FIRST_PIECE_BYTES = 256 * 1024;
const LEAST_PIECE_BYTES = 64 * 1024;
/** What is read of a piece is lent where it is so large that who sends it waits until it has gone; less is copied. */
const MIN_LENT_BYTES = 64 * 1024;
/** A reader that gets nothing for longer gives up: all tries of one range together are shorter. */
const READ_MS = 20_000;
/** Times of files in a list, asked for side by side. */
const HEADS_AT_ONCE = 64;
/** Times that are remembered, each in 16 bytes; one may be at any of some places beside each other. */
const KEPT_TIMES = 256 * 1024;
const TIMES_TOGETHER = 8;
/** Keys that are no path, said in the log: so many by name. */
const MAX_SAID_KEYS = 100;
/** How long the question whether S3 answers may take. */
const CHECK_MS = 3_000;
/** What had no room is said for so long, though there be room for less. */
const FULL_MS = 60_000;

export interface BucketOptions {
  /** Bytes of the largest file that is taken. */
  maxUpload?: number | undefined;
  /** Keeps chunks of files on this machine. */
  cache?: Cache | undefined;
  /** Told of what whoever runs the server should know, a line at a time. */
  say?: (path: string | undefined, what: string) => void;
  /** Told why the storage has refused something, or failed, which the peer is not. */
  tellWhy?: (path: string, code: ErrorCode, why: string) => void;
  /** Told what keeps files from being stored, for the other workers to `hear`; undefined when they are stored again. */
  tellRefusal?: (refusal: Refusal | undefined) => void;
  env?: Record<string, string | undefined>;
}

/** What keeps files from being stored. */
export interface Refusal {
  problem: string;
  isFull: boolean;
  /** By the clock. */
  at: number;
}

export function isBucket(root: string): boolean {
  return root.startsWith("s3://");
}

/** `s3://BUCKET/PREFIX`; where it is and who asks comes from the environment. Throws `usage`. */
export function openBucket(url: string, options: BucketOptions = {}): Bucket {
  const { bucket, prefix } = partsOf(url);
  const { env = process.env } = options;
  const accessKeyId = env.AWS_ACCESS_KEY_ID;
  const secretAccessKey = env.AWS_SECRET_ACCESS_KEY;
  if (!accessKeyId || !secretAccessKey) {
    throw new RepriseError("usage", `${quote(url)} needs AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY`);
  }
  const settings: S3Settings = {
    bucket,
    region: env.AWS_REGION || env.AWS_DEFAULT_REGION || "us-east-1",
    endpoint: checkEndpoint(env.AWS_ENDPOINT_URL_S3 || env.AWS_ENDPOINT_URL || undefined),
    accessKeyId,
    secretAccessKey,
    sessionToken: env.AWS_SESSION_TOKEN || undefined,
  };
  return new Bucket(new S3(settings), prefix, options);
}

function partsOf(url: string): { bucket: string; prefix: string } {
  const [, bucket = "", rest = ""] = /^s3:\/\/([a-zA-Z0-9._-]{3,255})(?:\/(.*))?$/s.exec(url) ?? [];
  const wrong = new RepriseError("usage", `the root ${quote(url)} is not s3://BUCKET or s3://BUCKET/PREFIX`);
  if (bucket === "") throw wrong;
  const path = rest.replace(/\/$/, "");
  try {
    if (splitPath(path).some(isHidden)) throw wrong;
  } catch {
    throw wrong;
  }
  return { bucket, prefix: path === "" ? "" : `${path}/` };
}

function checkEndpoint(text: string | undefined): string | undefined {
  if (text === undefined || /^https?:\/\/[^/?#]/.test(text)) return text;
  throw new RepriseError("usage", `AWS_ENDPOINT_URL is http://HOST:PORT or https://HOST, not ${quote(text)}`);
}

// ---------------------------------------------------------------------------------------------------- bucket

export class Bucket {
  readonly s3: S3;
  /** Of all keys: "" or with a "/" at its end. */
  readonly prefix: string;
  readonly maxUpload: number;
  readonly root: Root;
  readonly cache: Cache | undefined;
  readonly times = new Times();
  readonly reads = new Budget(READ_BUDGET_BYTES);
  /** Downloads that are under way. */
  readers = 0;
  readonly #say: (path: string | undefined, what: string) => void;
  readonly #tellWhy: (path: string, code: ErrorCode, why: string) => void;
  readonly #saidKeys = new Set<string | undefined>();
  #problem: string | undefined;
  readonly #tellRefusal: (refusal: Refusal | undefined) => void;
  #refusal: Refusal | undefined;

  constructor(s3: S3, prefix: string, options: BucketOptions) {
    const { maxUpload = UNKNOWN_SIZE, cache, say = () => {}, tellWhy = () => {}, tellRefusal = () => {} } = options;
    this.s3 = s3;
    this.prefix = prefix;
    this.maxUpload = maxUpload;
    this.cache = cache;
    this.#say = say;
    this.#tellWhy = tellWhy;
    this.#tellRefusal = tellRefusal;
    this.root = new BucketRoot(this, "");
  }

  /** Throws what keeps a server from being started with it, in words for who does that. */
  async check(isWritten: boolean): Promise<void> {
    try {
      await this.s3.list(this.prefix, { max: 1 });
      if (isWritten) await this.s3.remove(await this.#tryToWrite());
    } catch (error) {
      if (!(error instanceof S3Error)) throw error;
      // What is there can be read, and removed.
      if (error.isFull) return;
      throw new RepriseError(error.isPassing ? "busy" : "refused", this.#explain(error), error);
    }
  }

  /** Returns the key that is there then. */
  async #tryToWrite(limits?: RequestLimits): Promise<string> {
    const key = `${this.prefix}.reprise/try-${crypto.randomUUID()}`;
    await this.s3.put(key, "", {}, limits);
    return key;
  }

  /** What is wrong with the storage at this moment, for the server's status. */
  async problem(): Promise<string | undefined> {
    const limits = { withinMs: CHECK_MS };
    const [unread, unwritten] = await Promise.all([
      this.#failureOf(() => this.s3.list(this.prefix, { max: 1 }, limits)),
      // Nothing is written to a storage that is known to be well.
      this.#refusal && this.#failureOf(() => this.#tryToWrite(limits).then((key) => this.#removeInTime(key))),
    ]);
    if (!unread && !unwritten) this.#noteWell();
    const failure = unread ?? unwritten;
    if (failure) this.#note(this.#explain(failure));
    else this.#note(this.#refusal?.problem);
    return this.#problem;
  }

  /** Nobody waits for it: what stays is swept. */
  #removeInTime(key: string): void {
    this.s3.remove(key).catch(() => {});
  }

  async #failureOf(work: () => Promise<unknown>): Promise<S3Error | undefined> {
    try {
      await work();
      return undefined;
    } catch (error) {
      if (!(error instanceof S3Error)) throw error;
      return error;
    }
  }

  /** A little was stored. What had no room may have been more than that. */
  #noteWell(): void {
    const { isFull = false, at = 0 } = this.#refusal ?? {};
    if (!isFull || Date.now() - at > FULL_MS) this.noteWritten();
  }

  /** A file was stored. */
  noteWritten(): void {
    if (!this.#refusal) return;
    this.hear(undefined);
    this.#tellRefusal(undefined);
  }

  #noteRefusal(error: S3Error): void {
    const isNews = this.#refusal?.isFull !== error.isFull;
    this.hear({ problem: this.#explain(error), isFull: error.isFull, at: Date.now() });
    if (isNews) this.#tellRefusal(this.#refusal);
  }

  /** What another worker has been told; or undefined when that has stored something again. */
  hear(refusal: Refusal | undefined): void {
    this.#refusal = refusal;
  }

  /** What went wrong in words for the peer, which learns nothing of the storage itself. */
  errorOf(error: unknown, path: string): unknown {
    if (!(error instanceof S3Error)) return error;
    const [code, text] = wordsFor(error, quote(path));
    if (error.isWrite && (error.isFull || error.isPassing)) this.#noteRefusal(error);
    if (code === "busy") this.#note(this.#explain(error));
    else if (!IS_ANSWER.has(code)) this.#tellWhy(path, code, error.why);
    return new RepriseError(code, text, error);
  }

  /** Once for each, and not for all where there are many. */
  noteKey(key: string | undefined): void {
    if (this.#saidKeys.has(key) || this.#saidKeys.size > MAX_SAID_KEYS) return;
    this.#saidKeys.add(key);
    const isLast = this.#saidKeys.size > MAX_SAID_KEYS;
    this.#say(isLast ? undefined : key, isLast ? "further keys that are no path" : "a key that is no path");
  }

  #note(problem: string | undefined): void {
    if (problem !== this.#problem) this.#say(undefined, problem ?? "ok");
    this.#problem = problem;
  }

  #explain({ code, message, isFull, isWrite, status }: S3Error): string {
    const { address, settings } = this.s3;
    const bucket = quote(settings.bucket);
    if (isFull) return `the storage has no room for files: ${address} says: ${message}`;
    if (isWrite && status >= 429) return `the storage takes no files now: ${address} says: ${message}`;
    switch (code) {
      case "Unreachable":
        return `the storage cannot be reached: ${message} (AWS_ENDPOINT_URL)`;
      case "BadAnswer":
      case "IncompleteBody":
        return `the storage cannot be used: ${message} (AWS_ENDPOINT_URL)`;
      case "NoSuchBucket":
        return `there is no bucket ${bucket} at ${address}; create it there`;
      case "InvalidAccessKeyId":
      case "SignatureDoesNotMatch":
      case "InvalidToken":
      case "ExpiredToken":
      case "InvalidClientTokenId":
        return `${address} knows no such credentials (${code}): AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN`;
      case "AccessDenied":
        return `${address} does not let these credentials use the bucket ${bucket} (${message})`;
      case "PermanentRedirect":
      case "AuthorizationHeaderMalformed":
        return `the bucket ${bucket} is in another region than ${settings.region}: AWS_REGION (${message})`;
      case "RequestTimeTooSkewed":
        return `the clock of this machine is not that of ${address}`;
      default:
        return `${address} says: ${message}`;
    }
  }
}

/** What says nothing of the storage, but of what was asked for. */
const IS_ANSWER: ReadonlySet<string> = new Set(["not_found", "changed", "bad_name"]);

function wordsFor({ code, isPassing, isFull }: S3Error, name: string): [ErrorCode, string] {
  if (isFull) return ["no_room", `no room in the server's storage for ${name}; make room there and put it again`];
  if (isPassing) return ["busy", "the server's storage does not answer; try again in a moment"];
  switch (code) {
    case "NoSuchKey":
      return ["not_found", `not found: ${name}`];
    case "PreconditionFailed":
    case "ConditionalRequestConflict":
    case "InvalidRange":
      return ["changed", `changed on the server: ${name}`];
    case "AccessDenied":
      return ["refused", `refused: the server's storage does not let it use ${name}`];
    case "KeyTooLongError":
      return ["bad_name", `refused: the server's storage takes no such name: ${name}`];
    case "EntityTooLarge":
      return ["too_large", `refused: ${name} is larger than the server's storage takes`];
    default:
      return ["failed", `the server's storage failed over ${name}`];
  }
}

/** Bytes that many share. What is given back goes to who has waited longest. */
export class Budget {
  readonly bytes: number;
  #free: number;
  readonly #waiting: { bytes: number; resolve: () => void }[] = [];

  constructor(bytes: number) {
    this.bytes = bytes;
    this.#free = bytes;
  }

  /** False where there is too little, or somebody waits. */
  tryTake(bytes: number): boolean {
    if (this.#waiting.length > 0 || bytes > this.#free) return false;
    this.#free -= bytes;
    return true;
  }

  /** Whatever there is: for what nobody can do without. */
  takeAnyway(bytes: number): void {
    this.#free -= bytes;
  }

  /** More than all there is gets all there is. */
  async take(bytes: number): Promise<void> {
    if (this.tryTake(bytes)) return;
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#waiting.push({ bytes, resolve });
    this.#serve();
    await promise;
  }

  give(bytes: number): void {
    this.#free += bytes;
    this.#serve();
  }

  #serve(): void {
    for (let next = this.#waiting[0]; next; next = this.#waiting[0]) {
      if (next.bytes > this.#free && this.#free < this.bytes) return;
      this.#waiting.shift();
      this.#free -= next.bytes;
      next.resolve();
    }
  }
}

// ---------------------------------------------------------------------------------------------------- root

export class BucketRoot implements Root {
  readonly #bucket: Bucket;
  /** The folder in it that this is about; "" for itself. */
  readonly #folder: string;

  constructor(bucket: Bucket, folder: string) {
    this.#bucket = bucket;
    this.#folder = folder;
  }

  async stat(path: string): Promise<Meta> {
    const key = this.#keyOf(path);
    return this.#wrapped(path, async () => {
      const info = isFolderKey(key) ? undefined : await this.#bucket.s3.head(key);
      if (info) return metaOf(info);
      if (await hasKeysBeneath(this.#bucket, key)) return FOLDER;
      throw notFound(path);
    });
  }

  async open(path: string): Promise<OpenFile> {
    const key = this.#keyOf(path);
    return this.#wrapped(path, async () => {
      const info = isFolderKey(key) ? undefined : await this.#bucket.s3.head(key);
      if (info) return this.#file(key, path, metaOf(info));
      if (!isFolderKey(key) && !(await hasKeysBeneath(this.#bucket, key))) throw notFound(path);
      throw new RepriseError("not_a_file", `not a file: ${quote(path)} is a folder`);
    });
  }

  #file(key: string, path: string, meta: Meta): OpenFile {
    const { cache, s3 } = this.#bucket;
    const file = new BucketFile(this.#bucket, key, path, meta);
    return cache ? cache.wrap(`${s3.address}/${s3.settings.bucket}/${key}`, file) : file;
  }

  /** There is always something to wait for. */
  readNow(): undefined {
    return undefined;
  }

  async *list(path: string, recursive: boolean, etags = false): AsyncGenerator<Entry[]> {
    const key = this.#keyOf(path);
    const folder = isFolderKey(key) ? key : `${key}/`;
    try {
      const first = this.#page(folder, recursive, undefined);
      first.catch(() => {});
      const isFile = !isFolderKey(key) && (await this.#bucket.s3.head(key)) !== undefined;
      if (isFile) throw new RepriseError("not_a_folder", `not a folder: ${quote(path)}`);
      if (path !== "" && isEmpty(await first)) throw notFound(path);
      yield* this.#pages(first, folder, recursive, etags);
    } catch (error) {
      throw this.#bucket.errorOf(error, path);
    }
  }

  /** While one is shown, the next is on its way. */
  async *#pages(first: Promise<ListPage>, folder: string, recursive: boolean, etags: boolean) {
    const level = new Listing(this.#bucket, folder, recursive);
    for (let page: Promise<ListPage> | undefined = first; page; ) {
      const { objects, prefixes, next }: ListPage = await page;
      page = next === undefined ? undefined : this.#page(folder, recursive, next);
      page?.catch(() => {});
      const found = level.entriesOf(objects, prefixes);
      for (let at = 0; at < found.length; at += HEADS_AT_ONCE) {
        const some = await Promise.all(found.slice(at, at + HEADS_AT_ONCE).map((each) => this.#entryOf(each, etags)));
        const entries = some.filter((entry) => entry !== undefined);
        if (entries.length > 0) yield entries;
      }
    }
  }

  #page(folder: string, recursive: boolean, token: string | undefined): Promise<ListPage> {
    return this.#bucket.s3.list(folder, { ...(!recursive && { delimiter: "/" }), token });
  }

  /** A list of S3 does not say what was given with an object: that is asked for, once for each version. */
  async #entryOf({ path, object }: Found, etags: boolean): Promise<Entry | undefined> {
    if (!object) return { kind: "folder", size: 0, mtime: 0, path };
    const { times, s3 } = this.#bucket;
    const known = times.get(object);
    if (known !== undefined) {
      return { kind: "file", size: object.size, mtime: known, path, ...(etags && { etag: object.etag }) };
    }
    const info = await s3.head(object.key!);
    if (!info) return undefined;
    const { size, mtime, etag } = metaOf(info);
    if (etag === object.etag) times.set(object, mtime);
    return { kind: "file", size, mtime, path, ...(etags && { etag }) };
  }

  async beneath(path: string): Promise<Root> {
    const { kind } = await this.stat(path);
    if (kind !== "folder") throw new RepriseError("not_a_folder", `not a folder: ${quote(path)}`);
    return new BucketRoot(this.#bucket, join(this.#folder, path));
  }

  problem(): Promise<string | undefined> {
    return this.#bucket.problem();
  }

  close(): void {}

  async #wrapped<T>(path: string, work: () => Promise<T>): Promise<T> {
    try {
      return await work();
    } catch (error) {
      throw this.#bucket.errorOf(error, path);
    }
  }

  /** Throws `bad_name`, `not_found`. */
  #keyOf(path: string): string {
    if (splitPath(path).some(isHidden)) throw notFound(path);
    const key = keyFor(this.#bucket, this.#folder, path);
    if (Buffer.byteLength(key) > MAX_KEY_BYTES) throw notFound(path);
    return key;
  }
}

const FOLDER: Meta = { kind: "folder", size: 0, mtime: 0, etag: "" };

/** "" is the folder itself, whose key ends in "/" or is "". */
export function keyFor({ prefix }: Bucket, folder: string, path: string): string {
  const key = prefix + join(folder, path);
  return path === "" && folder !== "" ? `${key}/` : key;
}

function isFolderKey(key: string): boolean {
  return key === "" || key.endsWith("/");
}

/** Whether there is a folder at `key`. */
export async function hasKeysBeneath({ s3 }: Bucket, key: string): Promise<boolean> {
  // The root is there, whatever is in it.
  if (isFolderKey(key)) return true;
  return !isEmpty(await s3.list(`${key}/`, { max: 1 }));
}

function isEmpty({ objects, prefixes }: ListPage): boolean {
  return objects.length === 0 && prefixes.length === 0;
}

export function metaOf(info: ObjectInfo): Meta {
  const { size, etag, modifiedMs } = info;
  return { kind: "file", size, etag, mtime: timeOf(info.mtime) ?? modifiedMs * 1000 };
}

/** Seconds since 1970 with a fraction, to microseconds; undefined for what is no such time. */
function timeOf(text: string | undefined): number | undefined {
  const [, sign, seconds, fraction = ""] = /^(-?)(\d{1,12})(?:\.(\d+))?$/.exec(text ?? "") ?? [];
  if (seconds === undefined) return undefined;
  const mtime = Number(seconds) * 1e6 + Number(fraction.slice(0, 6).padEnd(6, "0"));
  if (!Number.isSafeInteger(mtime)) return undefined;
  return sign === "-" && mtime !== 0 ? -mtime : mtime;
}

/** The inverse. */
export function textOfTime(mtime: number): string {
  const micros = Math.abs(mtime);
  return `${mtime < 0 ? "-" : ""}${Math.floor(micros / 1e6)}.${String(micros % 1e6).padStart(6, "0")}`;
}

/** What was told of versions in lists, in memory that does not grow: where too many have one place, one of them goes. */
class Times {
  readonly #names = new BigUint64Array(KEPT_TIMES);
  readonly #times = new Float64Array(KEPT_TIMES);
  /** Nobody can make up two versions that are taken for each other. */
  readonly #seed = crypto.getRandomValues(new BigUint64Array(1))[0]!;

  get(object: ListedObject): number | undefined {
    const name = this.#nameOf(object);
    const at = this.#placeOf(name, name);
    return at === undefined ? undefined : this.#times[at];
  }

  set(object: ListedObject, mtime: number): void {
    const name = this.#nameOf(object);
    const at = this.#placeOf(name, name) ?? this.#placeOf(name, 0n) ?? Number(name % BigInt(KEPT_TIMES));
    this.#names[at] = name;
    this.#times[at] = mtime;
  }

  /** Of those where `name` may be, the one where `wanted` is; 0 is where nothing is. */
  #placeOf(name: bigint, wanted: bigint): number | undefined {
    const first = Number(name % BigInt(KEPT_TIMES));
    for (let step = 0; step < TIMES_TOGETHER; step++) {
      const at = (first + step) % KEPT_TIMES;
      if (this.#names[at] === wanted) return at;
    }
    return undefined;
  }

  #nameOf({ key, etag, modified }: ListedObject): bigint {
    return Bun.hash.xxHash64(`${etag} ${modified} ${key}`, this.#seed) || 1n;
  }
}

// ---------------------------------------------------------------------------------------------------- list

interface Found {
  path: string;
  /** Undefined for a folder. */
  object?: ListedObject;
}

/** Makes files and folders of keys, which come sorted: by what they begin with, all that is beneath a folder is together. */
class Listing {
  readonly #bucket: Bucket;
  readonly #prefix: string;
  readonly #recursive: boolean;
  /** The folder that the last key was in, as names, each shown already. */
  #folder: string[] = [];
  /** Files with which the last key begins, the shortest first: what is beneath one of these is left out. */
  #files: string[] = [];

  constructor(bucket: Bucket, prefix: string, recursive: boolean) {
    this.#bucket = bucket;
    this.#prefix = prefix;
    this.#recursive = recursive;
  }

  entriesOf(objects: ListedObject[], prefixes: (string | undefined)[]): Found[] {
    const all: { key: string | undefined; object?: ListedObject }[] = objects.map((object) => ({
      key: object.key,
      object,
    }));
    // Both are sorted, as bytes; together they are again.
    if (prefixes.length > 0) {
      for (const key of prefixes) all.push({ key });
      all.sort((a, b) => Buffer.compare(Buffer.from(a.key ?? ""), Buffer.from(b.key ?? "")));
    }
    return all.flatMap(({ key, object }) => this.#take(key, object));
  }

  #take(key: string | undefined, object: ListedObject | undefined): Found[] {
    if (key === undefined) {
      this.#bucket.noteKey(key);
      return [];
    }
    const name = key.slice(this.#prefix.length);
    // What is beneath a file comes before all that does not begin with its name.
    this.#files = this.#files.filter((file) => name.startsWith(file));
    const names = name.split("/");
    // A key that ends in "/" is a folder; that of the folder that was asked for, nothing.
    const isFolder = names.at(-1) === "";
    if (isFolder) names.pop();
    if (names.length === 0) return [];
    const shown = countShown(names);
    if (shown < names.length && !isHidden(names[shown]!)) this.#bucket.noteKey(key);
    const folders = names.slice(0, Math.min(shown, isFolder ? names.length : names.length - 1));
    const found = this.#enter(folders);
    if (!found) return [];
    if (isFolder || shown < names.length) return found;
    const path = names.join("/");
    this.#files.push(path);
    return [...found, { path, object: object! }];
  }

  /** The folders among these that were not shown; undefined where one of them is a file. */
  #enter(folders: string[]): Found[] | undefined {
    const path = folders.join("/");
    const at = path === "" ? "" : `${path}/`;
    if (this.#files.some((file) => at.startsWith(`${file}/`))) return undefined;
    let known = 0;
    while (known < folders.length && folders[known] === this.#folder[known]) known++;
    const found: Found[] = [];
    for (let end = known + 1; end <= folders.length; end++) found.push({ path: folders.slice(0, end).join("/") });
    this.#folder = folders;
    return this.#recursive ? found : found.slice(0, 1);
  }
}

/** How many of the names, from the first on, can be part of a path. */
function countShown(names: string[]): number {
  const end = names.findIndex((name) => isHidden(name) || !isName(name));
  return end < 0 ? names.length : end;
}

function isName(name: string): boolean {
  if (name === "" || name === "." || name === ".." || /[\0\r\n]/.test(name)) return false;
  return Buffer.byteLength(name) <= MAX_SEGMENT_BYTES;
}

// ---------------------------------------------------------------------------------------------------- file

interface Piece {
  offset: number;
  length: number;
  content: Promise<Uint8Array>;
  /** The same, if it is large and was read of. */
  held?: Uint8Array;
}

/** A version that is read from its bucket, for the most part from some place on to its end. */
class BucketFile implements Origin {
  readonly fd = undefined;
  readonly meta: Meta;
  readonly #bucket: Bucket;
  readonly #key: string;
  readonly #path: string;
  readonly #stop = new AbortController();
  /** Asked for, one behind the other, and not yet used up. */
  #pieces: Piece[] = [];
  /**
   * Memory of a large piece that was used up, for the next: fresh memory costs as much as receiving into it. Not of small
   * ones, of which hundreds of downloads have some each: what is kept alive of these is beyond what the budget knows.
   */
  #spare: Uint8Array | undefined;
  /** As much is asked for ahead: more with each piece that was used up. */
  #ahead = FIRST_PIECE_BYTES;
  /** Nobody wants what is behind. */
  #end: number;
  #isReading = false;

  constructor(bucket: Bucket, key: string, path: string, meta: Meta) {
    this.#bucket = bucket;
    this.#key = key;
    this.#path = path;
    this.meta = meta;
    this.#end = meta.size;
  }

  descriptorFor(): undefined {
    return undefined;
  }

  expect(end: number): void {
    this.#end = Math.min(end, this.meta.size);
  }

  /** What is large is lent: it holds until the next call. */
  async read(offset: number, length: number): Promise<Uint8Array> {
    if (length === 0) return new Uint8Array(0);
    if (!this.#isReading) this.#bucket.readers++;
    this.#isReading = true;
    this.#end = Math.max(this.#end, offset + length);
    this.#forgetUntil(offset);
    const parts: Uint8Array[] = [];
    for (let at = offset; at < offset + length; ) {
      const piece = this.#pieceAt(at);
      this.#askAhead();
      this.#spare = undefined;
      const content = await piece.content;
      if (content.length === MAX_PIECE_BYTES) piece.held = content;
      const part = content.subarray(at - piece.offset, Math.min(offset + length - piece.offset, piece.length));
      parts.push(part);
      at += part.length;
    }
    return parts.length === 1 && length >= MIN_LENT_BYTES ? parts[0]! : Buffer.concat(parts, length);
  }

  /** Lets go of what is before, which is read and by now sent, or of all where somebody reads elsewhere. */
  #forgetUntil(offset: number): void {
    const first = this.#pieces[0];
    if (first && offset < first.offset) this.#drop(this.#pieces.length);
    let count = 0;
    while (count < this.#pieces.length && endOf(this.#pieces[count]!) <= offset) count++;
    if (count > 0) this.#ahead = Math.min(2 * this.#ahead, MAX_AHEAD_BYTES);
    this.#spare = this.#pieces[count - 1]?.held;
    this.#drop(count);
  }

  #drop(count: number): void {
    for (const { length } of this.#pieces.splice(0, count)) this.#bucket.reads.give(length);
  }

  #pieceAt(at: number): Piece {
    const known = this.#pieces.find((piece) => piece.offset <= at && at < endOf(piece));
    if (known) return known;
    // Not one behind the other: what there is is of no use.
    if (this.#pieces.length > 0 && endOf(this.#pieces.at(-1)!) !== at) this.#drop(this.#pieces.length);
    return this.#ask(at, true)!;
  }

  #askAhead(): void {
    const { reads, readers } = this.#bucket;
    const share = Math.min(this.#ahead, reads.bytes / readers);
    for (;;) {
      const last = this.#pieces.at(-1)!;
      const asked = endOf(last) - this.#pieces[0]!.offset;
      if (endOf(last) >= this.#end || asked >= share || !this.#ask(endOf(last), false)) return;
    }
  }

  /** Ends at a multiple of its size, so that no further reading is put together from two. Undefined where there is no room. */
  #ask(offset: number, isNeeded: boolean): Piece | undefined {
    const { reads, readers, s3 } = this.#bucket;
    let size = sizeFor(Math.min(this.#ahead, reads.bytes / readers) / 2);
    let length = Math.min(size - (offset % size), this.#end - offset);
    if (!reads.tryTake(length)) {
      if (!isNeeded) return undefined;
      size = LEAST_PIECE_BYTES;
      length = Math.min(size - (offset % size), this.#end - offset);
      reads.takeAnyway(length);
    }
    const limits = { signal: this.#stop.signal, withinMs: READ_MS };
    const content = s3.read(this.#key, this.meta.etag, offset, length, limits, this.#spare).catch((error) => {
      throw this.#errorOf(error);
    });
    this.#spare = undefined;
    // Whether anybody comes for it or not.
    content.catch(() => {});
    const piece: Piece = { offset, length, content };
    this.#pieces.push(piece);
    return piece;
  }

  /** Between opening it and now it has got another version, or none: in either case it is no longer this one. */
  #errorOf(error: unknown): unknown {
    const isGone = error instanceof S3Error && error.code === "NoSuchKey";
    if (isGone) return new RepriseError("changed", `changed on the server: ${quote(this.#path)}`, error);
    return this.#bucket.errorOf(error, this.#path);
  }

  async fetch(offset: number, length: number): Promise<Uint8Array> {
    try {
      return await this.#bucket.s3.read(this.#key, this.meta.etag, offset, length, { withinMs: READ_MS });
    } catch (error) {
      throw this.#errorOf(error);
    }
  }

  async checksum(offset: number, length: number): Promise<number> {
    let sum = 0;
    for (let at = offset; at < offset + length; ) {
      const content = await this.read(at, Math.min(offset + length - at, MAX_PIECE_BYTES - (at % MAX_PIECE_BYTES)));
      sum = Bun.hash.crc32(content, sum);
      at += content.length;
    }
    return sum;
  }

  /** Each piece was asked for under its etag: what came is this version. */
  verify(): void {}

  close(): void {
    this.#stop.abort();
    this.#drop(this.#pieces.length);
    if (this.#isReading) this.#bucket.readers--;
    this.#isReading = false;
  }
}

function endOf({ offset, length }: Piece): number {
  return offset + length;
}

/** A power of 2. */
function sizeFor(bytes: number): number {
  let size = LEAST_PIECE_BYTES;
  while (2 * size <= Math.min(bytes, MAX_PIECE_BYTES)) size *= 2;
  return size;
}

function notFound(path: string): RepriseError {
  return new RepriseError("not_found", `not found: ${quote(path)}`);
}
