/**
 * Folders in either direction: what is there on both sides, what of it differs, and bringing that over.
 *
 * All files of a folder share a few connections, on each of which many requests are under way at a time. Small files are
 * written as the server writes its own: staged, synced in groups, renamed (changes.ts). Large ones go on where they were
 * cut, as single ones do. Nothing is removed unless everything else went well.
 */
import {
  closeSync,
  constants,
  fstatSync,
  lstatSync,
  openSync,
  readdirSync,
  readSync,
  realpathSync,
  rmdirSync,
  rmSync,
  statSync,
} from "node:fs";
import { basename, dirname, join } from "node:path";
import { type Change, type Changes, openChanges, type Upload } from "./changes.ts";
import { formatSize, print, printable, say, showsProgress } from "./command.ts";
import { type Context, Failures, remoteJoin } from "./context.ts";
import { crc32Of, isRunning } from "./disk.ts";
import {
  type Entry,
  type EntryKind,
  ERRORS,
  MAX_CONTENT_BYTES,
  MAX_WHOLE_BYTES,
  type Meta,
  quote,
  RepriseError,
  type Request,
  splitPath,
  TO_THE_END,
  toJson,
} from "./protocol.ts";
import {
  checkMeta,
  Dropped,
  type Exchange,
  type Peer,
  type Receiver,
  type Remote,
  UploadExchange,
  type UploadHooks,
  unexpected,
} from "./remote.ts";
import { asLocal, isUnfinished, LOG_SUFFIX, PartFile } from "./resume.ts";
import { errorCode, isHidden } from "./storage.ts";
import { isSame, lookAt, printDone, resumable, UploadLog } from "./transfer.ts";
import { asLocalSource, FileSource, SourceChanged } from "./upload.ts";

/** Files that are synced and get their names together, at most. */
const MAX_GROUP = 256;
/** Local folders whose names are held in memory. */
const MAX_KNOWN_FOLDERS = 100;
/** What is left of a refused answer is received and forgotten up to here; beyond, another connection costs less. */
const MAX_SKIPPED_BYTES = 1024 * 1024;

export interface TreeOptions {
  /** Folders that are named are meant with all that is in them. */
  recursive: boolean;
  /** Remove what the source does not have. */
  delete: boolean;
  /** Also if the source is empty or not there. */
  force: boolean;
  /** Only say what would be done. */
  dryRun: boolean;
  /** Compare content rather than size and time. */
  checksum: boolean;
  noClobber: boolean;
  /** For resume logs of uploads. */
  directory: string;
}

/** What has been done, for the progress line and the summary. */
export interface Tally {
  files: number;
  bytes: number;
  /** Files and bytes that are to be sent, as far as is known. */
  plannedFiles: number;
  plannedBytes: number;
  isPlanned: boolean;
  unchanged: number;
  removed: number;
}

/** A file or folder on the server, and its name in the local folder that it comes to; "" is that folder itself. */
export interface RemoteRoot {
  path: string;
  name: string;
}

/** A local file or folder, and its name in the folder on the server that it goes to; "" is that folder itself. */
export interface LocalRoot {
  file: string;
  name: string;
}

/** Brings files, and folders with all that is in them, to the folder `local`. */
export function getAll(context: Context, roots: RemoteRoot[], local: string, options: TreeOptions): Promise<Tally> {
  return new Download(context, roots, local, options).run();
}

/** Brings files, and folders with all that is in them, to the folder `path` on the server. */
export function putAll(context: Context, roots: LocalRoot[], path: string, options: TreeOptions): Promise<Tally> {
  return new TreeUpload(context, roots, path, options).run();
}

type Known = { kind: EntryKind | "other"; size: number; mtime: number };

/** What both directions have in common: sharing the work out, counting, saying. */
abstract class Transfer {
  readonly context: Context;
  readonly options: TreeOptions;
  readonly failures = new Failures();
  readonly tally: Tally = {
    files: 0,
    bytes: 0,
    plannedFiles: 0,
    plannedBytes: 0,
    isPlanned: false,
    unchanged: 0,
    removed: 0,
  };
  #line: { update(): void } | undefined;

  constructor(context: Context, options: TreeOptions) {
    this.context = context;
    this.options = options;
  }

  protected abstract work(): Promise<void>;
  protected abstract readonly name: string;

  async run(): Promise<Tally> {
    const line = showsProgress() ? new (await import("./terminal.ts")).FolderLine(this.name, this.tally) : undefined;
    this.#line = line;
    try {
      await this.work();
      this.failures.throwFirst();
      return this.tally;
    } catch (error) {
      throw resumable(error);
    } finally {
      line?.end();
    }
  }

  done(path: string, file: string, meta: Meta, offset: number, started: number): Promise<void> | undefined {
    this.tally.files++;
    this.#line?.update();
    return this.context.json ? printDone(this.context, { path, file, ...meta, offset, started }) : undefined;
  }

  /** So many more bytes went over. */
  moved(bytes: number): void {
    this.tally.bytes += bytes;
    this.#line?.update();
  }

  /** Whether what is there already needs nothing: a folder, or a file that is left as it is or the same. */
  protected isLeft(item: Known, there: Known | undefined): boolean {
    if (item.kind !== there?.kind) return false;
    if (item.kind === "folder") return true;
    const isLeft = this.options.noClobber || (!this.options.checksum && isSame(item, there));
    if (isLeft) this.tally.unchanged++;
    return isLeft;
  }

  /** `name` is what it gets on the other side: "" for a folder that becomes the one there. */
  protected isMeant(kind: EntryKind, name: string, path: string): boolean {
    if (kind === "file" && name !== "") return true;
    if (kind === "folder" && this.options.recursive) return true;
    this.failures.add(
      kind === "file"
        ? new RepriseError("not_a_folder", `not a folder: ${quote(path)}`)
        : new RepriseError("not_a_file", `not a file: ${quote(path)} is a folder; -r takes all that is in it`),
    );
    return false;
  }

  protected plan(bytes: number): void {
    this.tally.plannedFiles++;
    this.tally.plannedBytes += bytes;
  }

  /** For `--dry-run`; `action path size` is the contract for `--json`. */
  protected async announce(action: string, path: string, size = 0): Promise<void> {
    await print(this.context.json ? toJson({ action, path, size }) : `${action} ${printable(path)}`);
  }

  /** Another connection to the server. */
  protected connect(): Remote {
    return this.context.connectTo(this.context.server);
  }

  /** Runs the exchanges over as many connections as there are jobs, and no more than there are exchanges. */
  protected async share(batches: AsyncIterator<Exchange[]>, beforeWait?: () => Promise<void>): Promise<void> {
    const shared = new Shared(batches);
    const count = await shared.countUpTo(this.context.jobs);
    const remotes = Array.from({ length: count }, () => this.connect());
    let failure: unknown;
    await Promise.all(
      remotes.map(async (remote) => {
        try {
          await remote.run(() => shared.next(), beforeWait);
        } catch (error) {
          failure ??= error;
          for (const other of remotes) other.giveUp();
        } finally {
          remote.close();
        }
      }),
    );
    if (failure) throw failure;
  }
}

/** Work that several connections take from, as it becomes known. */
class Shared {
  readonly #batches: AsyncIterator<Exchange[]>;
  #ready: Exchange[] = [];
  #at = 0;
  #more: Promise<boolean> | undefined;

  constructor(batches: AsyncIterator<Exchange[]>) {
    this.#batches = batches;
  }

  /** At once where one is known; undefined at the end. */
  next(): Exchange | undefined | Promise<Exchange | undefined> {
    return this.#ready[this.#at] ? this.#ready[this.#at++] : this.#wait();
  }

  /** How many there are, if less than `limit`. */
  async countUpTo(limit: number): Promise<number> {
    while (this.#ready.length < limit && (await this.#fill()));
    return Math.min(limit, this.#ready.length);
  }

  async #wait(): Promise<Exchange | undefined> {
    while (!this.#ready[this.#at]) if (!(await this.#fill())) return undefined;
    return this.#ready[this.#at++];
  }

  /** One more batch; several who ask for it at the same time get the same. False at the end. */
  #fill(): Promise<boolean> {
    this.#more ??= this.#batches.next().then(({ value, done }) => {
      this.#more = undefined;
      if (done) return false;
      this.#ready = [...this.#ready.slice(this.#at), ...value];
      this.#at = 0;
      return true;
    });
    return this.#more;
  }
}

// ---------------------------------------------------------------------------------------------------- download

/** What is to come here: its path is relative to the local folder, `remote` is where it is on the server. */
interface Item extends Entry {
  remote: string;
}

class Download extends Transfer {
  readonly #roots: RemoteRoot[];
  readonly #local: string;
  protected readonly name: string;
  #folder: LocalFolder | undefined;
  /** Whole files that wait for their name. */
  #group: { upload: Upload; fetch: Fetch }[] = [];
  /** Parts that are open: at the prompt the next line may want them. */
  readonly parts = new Set<PartFile>();
  /** What the server has, kept only where other things are to be removed. */
  readonly #seen: Set<string> | undefined;
  #entries = 0;
  /** Where something of another kind was in the way. */
  readonly #cleared = new Set<string>();
  #isCut = false;
  #cuts = 0;
  #names: LocalNames;
  /** For checksums, since the list has its connection for itself. */
  #other: Remote | undefined;

  constructor(context: Context, roots: RemoteRoot[], local: string, options: TreeOptions) {
    super(context, options);
    this.#roots = roots;
    this.#local = local;
    this.name = (roots.length === 1 && basename(roots[0]!.path)) || basename(local);
    this.#seen = options.delete ? new Set() : undefined;
    this.#names = new LocalNames(local);
  }

  get changes(): Changes {
    return this.#folder!.changes;
  }

  fileOf(path: string): string {
    return join(this.#local, path);
  }

  protected async work(): Promise<void> {
    const known = await lookRemotely(this.context.remote, this.#roots, (error) => this.failures.add(error));
    const found = known.filter(({ kind, path, remote }) => this.isMeant(kind, path, remote || "/"));
    if (found.length === 0) return;
    if (!this.options.dryRun) this.#folder = new LocalFolder(this.#local);
    try {
      do {
        this.#isCut = false;
        await this.share(this.#plan(found), () => this.commit());
        await this.commit();
      } while (this.#isCut);
      if (this.options.delete) await this.#removeOthers();
    } finally {
      for (const { upload } of this.#group) upload.close();
      for (const part of this.parts) part.close();
      this.#other?.close();
      await this.#folder?.leave(this.failures.count === 0);
    }
  }

  /** A part is written by its path, unlike small files: no link on the way may lead elsewhere. Throws `local`. */
  checkFolderOf(path: string): void {
    const folder = dirname(this.fileOf(path));
    try {
      if (realpathSync(folder) === join(realpathSync(this.#local), dirname(path))) return;
    } catch (error) {
      throw asLocal(error, this.fileOf(path));
    }
    throw new RepriseError("local", `cannot write ${quote(this.fileOf(path))}: ${quote(folder)} leads over a link`);
  }

  /** A small file is whole; it gets its name with the next group. Something to wait for, once that is due. */
  add(upload: Upload, fetch: Fetch): Promise<void> | undefined {
    this.#group.push({ upload, fetch });
    return this.#group.length >= MAX_GROUP ? this.commit() : undefined;
  }

  /** Gives the files that wait their names, all together. */
  async commit(): Promise<void> {
    const group = this.#group;
    if (group.length === 0) return;
    this.#group = [];
    try {
      const outcomes = await this.changes.apply(group.map(({ upload }) => upload));
      for (const [index, { fetch }] of group.entries()) {
        const outcome = outcomes[index];
        const said = outcome instanceof RepriseError ? this.failures.add(localProblem(outcome)) : fetch.isDone();
        if (said) await said;
      }
    } finally {
      for (const { upload } of group) upload.close();
    }
  }

  /** Exchanges for what differs, while the lists still come. */
  async *#plan(found: Item[]): AsyncGenerator<Exchange[]> {
    for (const item of found) {
      if (item.path !== "") yield this.#considerAll([item]);
      if (item.kind === "folder") yield* this.#planBelow(item);
    }
    this.tally.isPlanned = true;
  }

  async *#planBelow(folder: Item): AsyncGenerator<Exchange[]> {
    try {
      for await (const entries of this.context.remote.listMany(folder.remote, true)) {
        this.#entries += entries.length;
        const items = entries.map((entry) => {
          const { kind, size, mtime } = entry;
          const path = remoteJoin(folder.path, entry.path);
          return { kind, size, mtime, path, remote: remoteJoin(folder.remote, entry.path) };
        });
        yield this.#considerAll(items);
      }
    } catch (error) {
      if (!this.#listsAgain(error)) this.failures.add(error);
    }
  }

  /** After a list that was cut in the middle all is gone through once more: what has come meanwhile is there. */
  #listsAgain(error: unknown): boolean {
    const isLoss = error instanceof RepriseError && ERRORS[error.code].retry;
    if (!isLoss || this.options.dryRun || ++this.#cuts > this.context.remote.retries) return false;
    this.context.remote.note(`${error.message}; asking for the rest of the list`);
    this.#isCut = true;
    this.#names = new LocalNames(this.#local);
    this.tally.unchanged = -this.tally.plannedFiles;
    return true;
  }

  async #considerAll(items: Item[]): Promise<Exchange[]> {
    const exchanges: Exchange[] = [];
    for (const item of items) {
      try {
        const considered = this.#consider(item);
        const exchange = considered instanceof Promise ? await considered : considered;
        if (exchange) exchanges.push(exchange);
      } catch (error) {
        this.failures.add(error);
      }
    }
    return exchanges;
  }

  /** At once for what is not there, which with many files is most. */
  #consider(item: Item): Exchange | undefined | Promise<Exchange | undefined> {
    checkName(item.path);
    this.#seen?.add(item.path);
    const here = this.#names.has(item.path) ? lookLocally(this.fileOf(item.path)) : undefined;
    if (this.isLeft(item, here)) return this.#tidy(item);
    const isNew = item.kind === "file" && !this.options.dryRun && !here;
    return isNew ? this.#fetch(item) : this.#compare(item, here);
  }

  /** Of a file that is there: a kill may have come between the last rename and the removal of the log. */
  #tidy({ kind, path }: Item): undefined {
    const isTidy = kind === "folder" || this.options.dryRun || !this.#names.has(path + LOG_SUFFIX);
    if (!isTidy) PartFile.clear(this.fileOf(path));
  }

  #fetch(item: Item): Exchange {
    this.plan(item.size);
    return new Fetch(this, item, this.#names.has(item.path + LOG_SUFFIX));
  }

  async #compare(item: Item, here: Known | undefined): Promise<Exchange | undefined> {
    const file = this.fileOf(item.path);
    if (here && here.kind !== item.kind) await this.#clear(item, file);
    if (item.kind === "folder") return this.#makeFolder(item.path);
    if (here?.kind === "file" && (await this.#hasSameContent(item, here, file))) {
      this.tally.unchanged++;
      return this.#tidy(item);
    }
    if (!this.options.dryRun) return this.#fetch(item);
    this.plan(item.size);
    await this.announce("get", item.remote, item.size);
    return undefined;
  }

  async #makeFolder(path: string): Promise<undefined> {
    if (this.options.dryRun) await this.announce("mkdir", this.fileOf(path));
    else await this.#change({ action: "mkdir", path, parents: true });
  }

  /** Something of another kind has the name: it is in the way, or to be removed. */
  async #clear({ path, kind }: Item, file: string): Promise<void> {
    if (!this.options.delete) throw new RepriseError("local", `${quote(file)} is in the way: it is not a ${kind}`);
    this.tally.removed++;
    this.#cleared.add(path);
    if (this.options.dryRun) await this.announce("delete", file);
    else await this.#change({ action: "remove", path, recursive: true });
  }

  async #change(change: Change): Promise<void> {
    const [outcome] = await this.changes.apply([change]);
    if (outcome instanceof RepriseError) throw localProblem(outcome);
  }

  async #hasSameContent(item: Item, here: Known, file: string): Promise<boolean> {
    if (!this.options.checksum || item.size !== here.size) return false;
    this.#other ??= this.connect();
    return sameContent(await this.#other.sums(item.remote), file);
  }

  async #removeOthers(): Promise<void> {
    this.failures.throwFirst();
    if (this.#entries === 0 && !this.options.force) throw emptySource(this.#roots[0]!.path, "on the server");
    if (!lookAt(this.#local)) return;
    const isKept = (path: string) => this.#seen!.has(path) && !this.#cleared.has(path);
    for (const { path, kind } of walk(this.#local, isKept, undefined, this.failures)) {
      if (this.#seen!.has(path)) continue;
      try {
        if (kind === "folder" && holdsUnfinished(this.fileOf(path))) {
          say("warn", `${quote(this.fileOf(path))} is left: there is an unfinished transfer in it`);
          continue;
        }
        this.tally.removed++;
        if (this.options.dryRun) await this.announce("delete", this.fileOf(path));
        else await this.#change({ action: "remove", path, recursive: kind === "folder" });
      } catch (error) {
        this.failures.add(error);
      }
    }
  }
}

/** What the server calls a name may lead anywhere, or to what is ours. */
function checkName(path: string): void {
  const segments = splitPath(path);
  if (segments.length === 0) throw new RepriseError("bad_name", "the server lists something without a name");
  if (segments.some((name) => isHidden(name) || isUnfinished(name))) {
    throw new RepriseError("local", `cannot write ${quote(path)}: such names are for unfinished transfers`);
  }
}

/** One file on its way here. */
class Fetch implements Exchange {
  readonly #tree: Download;
  readonly #item: Item;
  readonly #isBegun: boolean;
  readonly #startedAt = performance.now();
  /** Of a large file, or of one that was begun earlier. */
  #part: PartFile | undefined;
  #meta: Meta | undefined;
  #asked = { offset: 0, etag: "" };
  /** What was there before. */
  #offset: number | undefined;
  #restarts = 0;

  /** `isBegun`: there is a log of an earlier attempt. */
  constructor(tree: Download, item: Item, isBegun: boolean) {
    this.#tree = tree;
    this.#item = item;
    this.#isBegun = isBegun;
  }

  open(): Promise<void> | undefined {
    return this.#part || !this.#isBegun ? undefined : this.#openPart().then(() => {});
  }

  ask(peer: Peer): Promise<void> | undefined {
    const { bytes: offset = 0, end, etag = "" } = this.#segment() ?? {};
    this.#asked = { offset, etag };
    const length = end === undefined ? TO_THE_END : end - offset;
    return peer.askNow({ action: "get", path: this.#item.remote, offset, length, etag });
  }

  take(peer: Peer): Promise<boolean> | boolean {
    const answer = peer.peekNow();
    if (answer?.type !== "file") return this.#takeAnswer(peer);
    peer.drop();
    return this.#takeWhole(answer);
  }

  async #takeAnswer(peer: Peer): Promise<boolean> {
    try {
      await peer.peek();
      if (peer.peekNow()?.type === "file") return this.#takeWhole(await peer.expect("file"));
      const { kind, size, mtime, etag, offset } = await peer.expect("meta");
      this.#meta = { kind, size, mtime, etag };
      checkMeta(this.#meta, offset, this.#asked);
      this.#offset ??= this.#part?.bytes ?? 0;
      const isSmall = !this.#part && size <= MAX_CONTENT_BYTES;
      return await (isSmall ? this.#takeSmall(peer, this.#meta) : this.#takeLarge(peer, this.#meta));
    } catch (error) {
      const isChange = error instanceof RepriseError && error.code === "changed";
      if (!isChange || !this.#part || this.#part.bytes === 0) throw error;
      if (++this.#restarts > this.#tree.context.remote.retries) {
        throw new RepriseError("changed", `${error.message}, again and again; get it when it is at rest`);
      }
      say("warn", `${error.message}; starting again`);
      this.#part.reset();
      this.#offset = undefined;
      return true;
    }
  }

  failed(error: RepriseError): void {
    this.#closePart();
    this.#tree.failures.add(error);
  }

  isDone(): Promise<void> | undefined {
    return this.#tree.done(this.#item.remote, this.#file, this.#meta!, this.#offset!, this.#startedAt);
  }

  get #file(): string {
    return this.#tree.fileOf(this.#item.path);
  }

  /** The first that is not complete. */
  #segment() {
    const segments = this.#part?.segments;
    return segments?.find(({ bytes, end }) => end === undefined || bytes < end) ?? segments?.at(-1);
  }

  async #openPart(): Promise<PartFile> {
    const { server } = this.#tree.context;
    this.#tree.checkFolderOf(this.#item.path);
    this.#part = await PartFile.open(this.#file, this.#item.remote, server, (text) => say("warn", text));
    this.#tree.parts.add(this.#part);
    return this.#part;
  }

  #closePart(): void {
    if (this.#part && this.#tree.parts.delete(this.#part)) this.#part.close();
    this.#part = undefined;
  }

  /** Content that came in one frame. */
  #takeWhole({ kind, size, mtime, etag, content }: Meta & { content: Uint8Array }): Promise<boolean> | boolean {
    if (this.#part) throw new RepriseError("bad_frame", "the server sends a whole file for a part");
    this.#meta = { kind, size, mtime, etag };
    checkMeta(this.#meta, 0, this.#asked);
    this.#offset = 0;
    const upload = this.#tree.changes.receive({ ...NEW_FILE, path: this.#item.path, size, mtime }, true);
    try {
      upload.write(content);
    } catch (error) {
      upload.close();
      throw error;
    }
    this.#tree.moved(size);
    return this.#tree.add(upload, this)?.then(() => false) ?? false;
  }

  async #takeSmall(peer: Peer, { size, mtime }: Meta): Promise<false> {
    const put = { ...NEW_FILE, path: this.#item.path, size, mtime };
    const upload = await this.#orSkip(peer, size, () => this.#tree.changes.receive(put, true));
    try {
      await this.#receive(peer, upload, size);
      await upload.settle();
      if (upload.bytes !== size) throw unexpected(`the end after ${upload.bytes} of ${size} bytes`);
    } catch (error) {
      upload.close();
      throw error;
    }
    await this.#tree.add(upload, this);
    return false;
  }

  async #takeLarge(peer: Peer, meta: Meta): Promise<boolean> {
    const part = this.#part ?? (await this.#orSkip(peer, meta.size, () => this.#openPart()));
    const segment = this.#segment()!;
    segment.begin(meta);
    try {
      await this.#receive(peer, segment, meta.size);
    } catch (error) {
      // What went wrong on the way counts: it may be that the connection is no more use.
      await segment.settle().catch(() => {});
      throw error;
    }
    await segment.settle();
    if (segment.bytes === this.#asked.offset && part.bytes < meta.size)
      throw unexpected(`the end after ${segment.bytes} of ${meta.size} bytes`);
    if (part.bytes < meta.size) return true;
    await part.finish();
    this.#closePart();
    await this.isDone();
    return false;
  }

  async #receive(peer: Peer, target: Receiver, size: number): Promise<void> {
    let { bytes } = target;
    try {
      await peer.receive(target, size, (position) => {
        this.#tree.moved(position - bytes);
        bytes = position;
      });
    } catch (error) {
      if (error instanceof RepriseError && error.code === "local") await skip(peer, size - bytes, error);
      throw error;
    }
  }

  /** A local failure before the content came leaves an answer that must be got rid of. */
  async #orSkip<T>(peer: Peer, bytes: number, work: () => T | Promise<T>): Promise<T> {
    try {
      return await work();
    } catch (error) {
      const problem = asLocal(error, this.#file);
      await skip(peer, bytes, problem);
      throw problem;
    }
  }
}

/** Gets rid of the rest of an answer. */
async function skip(peer: Peer, bytes: number, problem: RepriseError): Promise<void> {
  if (bytes > MAX_SKIPPED_BYTES) throw new Dropped(problem);
  await peer.skip();
}

// ---------------------------------------------------------------------------------------------------- upload

/** What is to go: its path is relative to the folder on the server, and begins with its root's name. */
interface LocalItem extends LocalEntry {
  root: LocalRoot;
}

/** Where it is here; not kept, since a hundred thousand such names take more memory than all the rest. */
function fileOf({ path, root }: LocalItem): string {
  return path === root.name ? root.file : join(root.file, path.slice(root.name === "" ? 0 : root.name.length + 1));
}

class TreeUpload extends Transfer {
  readonly #roots: LocalRoot[];
  readonly #path: string;
  protected readonly name: string;
  /** What the server has, by path. */
  readonly #there = new Map<string, Entry>();
  /** What is here, kept only where other things are to be removed. */
  readonly #seen: Set<string> | undefined;
  #isRootThere = false;
  #leftOut = 0;

  constructor(context: Context, roots: LocalRoot[], path: string, options: TreeOptions) {
    super(context, options);
    this.#roots = roots;
    this.#path = path;
    this.#seen = options.delete ? new Set() : undefined;
    this.name = (roots.length === 1 && basename(roots[0]!.file)) || basename(path);
  }

  pathOf(path: string): string {
    return remoteJoin(this.#path, path);
  }

  protected async work(): Promise<void> {
    const roots = this.#findRoots();
    await this.#look(roots);
    await this.share(this.#plan(roots));
    if (this.#seen) await this.#removeOthers(this.#seen);
    if (this.#leftOut > 0) say("warn", `${this.#leftOut} links, devices and unfinished transfers were left out`);
  }

  /** Exchanges for what differs, while the folders are still being looked through. */
  async *#plan(roots: LocalItem[]): AsyncGenerator<Exchange[]> {
    let exchanges: Exchange[] = [];
    for (const item of this.#items(roots)) {
      try {
        const considered = this.#consider(item);
        const exchange = considered instanceof Promise ? await considered : considered;
        if (exchange) exchanges.push(exchange);
      } catch (error) {
        this.failures.add(error);
      }
      if (exchanges.length < MAX_GROUP) continue;
      yield exchanges;
      exchanges = [];
    }
    this.tally.isPlanned = true;
    yield exchanges;
  }

  /** At once for what the server does not have, which with many files is most. */
  #consider(item: LocalItem): Exchange | undefined | Promise<Exchange | undefined> {
    splitPath(this.pathOf(item.path));
    if (item.path !== "") this.#seen?.add(item.path);
    const there = this.#there.get(item.path);
    if (this.isLeft(item, there)) return this.#tidy(item);
    return there || this.options.dryRun ? this.#compare(item) : this.#store(item);
  }

  async #compare(item: LocalItem): Promise<Exchange | undefined> {
    const there = this.#there.get(item.path);
    if (there && there.kind !== item.kind) await this.#clear(there, item);
    if (there?.kind === "file" && item.kind === "file" && (await this.#hasSameContent(item, there))) {
      this.tally.unchanged++;
      return this.#tidy(item);
    }
    if (!this.options.dryRun) return this.#store(item);
    if (item.kind === "file") this.plan(item.size);
    await this.announce(item.kind === "folder" ? "mkdir" : "put", this.pathOf(item.path), item.size);
    return undefined;
  }

  /** Of a file that is there: a kill may have come before its log was removed. */
  #tidy(item: LocalItem): undefined {
    if (item.kind === "folder" || item.size <= MAX_WHOLE_BYTES || this.options.dryRun) return;
    new UploadLog(this.options, fileOf(item), this.pathOf(item.path), this.context.server).remove();
  }

  #store(item: LocalItem): Exchange {
    if (item.kind === "folder") {
      const request = { action: "mkdir", path: this.pathOf(item.path), parents: true } as const;
      return new ChangeExchange(request, (error) => this.failures.add(error));
    }
    this.plan(item.size);
    return item.size <= MAX_WHOLE_BYTES ? new Store(this, item) : new StoreLarge(this, item);
  }

  /** A link that is named is followed, as it is in a shell. */
  #findRoots(): LocalItem[] {
    return this.#roots.flatMap((root) => {
      const { file, name } = root;
      const stat = statSync(file, { bigint: true, throwIfNoEntry: false });
      const kind = stat?.isFile() ? "file" : stat?.isDirectory() ? "folder" : undefined;
      if (kind && !this.isMeant(kind, name, file)) return [];
      if (stat && kind) return { path: name, root, kind, size: Number(stat.size), mtime: Number(stat.mtimeNs / 1000n) };
      const what = stat ? "neither a file nor a folder" : "it is not there";
      this.failures.add(new RepriseError("local", `cannot send ${quote(file)}: ${what}`));
      return [];
    });
  }

  *#items(roots: LocalItem[]): Generator<LocalItem> {
    for (const item of roots) {
      const { path, root, kind } = item;
      // The folder itself as well: it may be empty, and not there.
      if (path !== "" || !this.#isRootThere) yield item;
      if (kind === "file") continue;
      for (const entry of walk(root.file, undefined, () => this.#leftOut++, this.failures)) {
        entry.path = remoteJoin(path, entry.path);
        yield Object.assign(entry, { root });
      }
    }
  }

  /** Learns what the server has of it. */
  async #look(roots: LocalItem[]): Promise<void> {
    const wanted = roots.map(({ path }) => ({ path: this.pathOf(path), name: path }));
    for (const entry of await lookRemotely(this.context.remote, wanted)) {
      this.#there.set(entry.path, entry);
      const root = roots.find(({ path }) => path === entry.path);
      if (entry.kind !== "folder" || root?.kind !== "folder") continue;
      for await (const below of this.context.remote.list(entry.remote, true)) {
        const path = remoteJoin(entry.path, below.path);
        this.#there.set(path, { ...below, path });
      }
    }
    this.#isRootThere = this.#there.delete("");
  }

  async #hasSameContent(item: LocalItem, there: Entry): Promise<boolean> {
    if (!this.options.checksum || item.size !== there.size) return false;
    return sameContent(await this.context.remote.sums(this.pathOf(item.path)), fileOf(item));
  }

  /** Something of another kind has the name: it is in the way, or to be removed. */
  async #clear(there: Entry, { kind }: LocalItem): Promise<void> {
    const path = this.pathOf(there.path);
    if (!this.options.delete) {
      throw new RepriseError("exists", `${quote(path)} is in the way on the server: it is not a ${kind}`);
    }
    this.tally.removed++;
    if (this.options.dryRun) await this.announce("delete", path);
    else await this.context.remote.remove(path, true);
    for (const other of this.#there.keys()) {
      if (other === there.path || other.startsWith(`${there.path}/`)) this.#there.delete(other);
    }
  }

  async #removeOthers(seen: Set<string>): Promise<void> {
    this.failures.throwFirst();
    if (seen.size === 0 && !this.options.force) throw emptySource(this.#roots[0]!.file, "here");
    const others = [...this.#there.values()].filter(({ path }) => !seen.has(path) && !isBelow(path, this.#there, seen));
    const exchanges: Exchange[] = [];
    for (const { path, kind } of others) {
      this.tally.removed++;
      const remote = this.pathOf(path);
      if (this.options.dryRun) await this.announce("delete", remote);
      else {
        const request = { action: "remove", path: remote, recursive: kind === "folder" } as const;
        exchanges.push(new ChangeExchange(request, (error) => this.failures.add(error)));
      }
    }
    if (exchanges.length > 0) await this.context.remote.run(exchanges);
  }
}

/** Whether the folder that a path is in is itself one of those to be removed. */
function isBelow(path: string, there: Map<string, Entry>, seen: Set<string>): boolean {
  const folder = path.slice(0, Math.max(0, path.lastIndexOf("/")));
  return folder !== "" && there.has(folder) && !seen.has(folder);
}

/** A file that travels in one frame. */
class Store implements Exchange {
  readonly #tree: TreeUpload;
  readonly #item: LocalItem;
  readonly #startedAt = performance.now();
  /** Let go of once it is sent. */
  #content: Uint8Array | undefined;
  #mtime = 0;

  constructor(tree: TreeUpload, item: LocalItem) {
    this.#tree = tree;
    this.#item = item;
  }

  open(): undefined {
    const { content, mtime } = readSmall(fileOf(this.#item));
    this.#content = content;
    this.#mtime = mtime;
  }

  ask(peer: Peer): Promise<void> | undefined {
    const content = this.#content!;
    this.#content = undefined;
    const { noClobber } = this.#tree.options;
    const path = this.#tree.pathOf(this.#item.path);
    const flushing = peer.askNow({ ...NEW_FILE, noClobber, path, size: content.length, mtime: this.#mtime, content });
    this.#tree.moved(content.length);
    const pace = peer.pace(content.length);
    return flushing && pace ? Promise.all([flushing, pace]).then(() => {}) : (flushing ?? pace);
  }

  take(peer: Peer): Promise<boolean> | boolean {
    const answer = peer.peekNow();
    if (answer?.type !== "meta") return this.#takeLater(peer);
    peer.drop();
    return this.#isDone(peer, answer)?.then(() => false) ?? false;
  }

  failed(error: RepriseError): void {
    this.#tree.failures.add(error);
  }

  async #takeLater(peer: Peer): Promise<boolean> {
    await this.#isDone(peer, await peer.expect("meta"));
    return false;
  }

  #isDone(peer: Peer, { kind, size, mtime, etag }: Meta): Promise<void> | undefined {
    peer.progress = true;
    const { path } = this.#item;
    const file = fileOf(this.#item);
    return this.#tree.done(this.#tree.pathOf(path), file, { kind, size, mtime, etag }, 0, this.#startedAt);
  }
}

/** A file that is gone on with where it was cut. */
class StoreLarge implements Exchange {
  readonly #tree: TreeUpload;
  readonly #item: LocalItem;
  readonly #startedAt = performance.now();
  #source: FileSource | undefined;
  #log: UploadLog | undefined;
  #upload: UploadExchange | undefined;
  #start = Number.POSITIVE_INFINITY;
  #sent = 0;

  constructor(tree: TreeUpload, item: LocalItem) {
    this.#tree = tree;
    this.#item = item;
  }

  async open(): Promise<void> {
    if (this.#upload) return;
    const { context, options } = this.#tree;
    const file = fileOf(this.#item);
    const path = this.#tree.pathOf(this.#item.path);
    const source = new FileSource(file);
    // What travels in one frame is not worth a log.
    const log = source.size > MAX_CONTENT_BYTES ? new UploadLog(options, file, path, context.server) : undefined;
    const resumes = log?.resumes(source) ?? false;
    const put = { path, id: log?.id ?? "", noClobber: options.noClobber, parents: true, etag: "" };
    this.#source = source;
    this.#log = log;
    this.#upload = new UploadExchange(context.remote, put, source, this.#hooks(source, log), resumes);
  }

  preparation() {
    return this.#upload!.preparation();
  }

  ask(peer: Peer): Promise<void> {
    return this.#upload!.ask(peer);
  }

  async take(peer: Peer): Promise<boolean> {
    if (await this.#upload!.take(peer)) return true;
    this.#source!.close();
    this.#log?.remove();
    const { path } = this.#item;
    const file = fileOf(this.#item);
    const offset = Number.isFinite(this.#start) ? this.#start : 0;
    await this.#tree.done(this.#tree.pathOf(path), file, this.#upload!.result(), offset, this.#startedAt);
    return false;
  }

  failed(error: RepriseError): void {
    this.#source?.close();
    this.#log?.keepFor(error);
    this.#tree.failures.add(error);
  }

  #hooks(source: FileSource, log: UploadLog | undefined): UploadHooks {
    return {
      begin: (_, offset, crc32) => {
        this.#start = Math.min(this.#start, offset);
        this.#sent = offset;
        log?.begin(source, offset, crc32);
      },
      progress: (bytes, crc32) => {
        this.#tree.moved(bytes - this.#sent);
        this.#sent = bytes;
        log?.sent(bytes, crc32);
      },
    };
  }
}

/** A request that has END for its answer. Asked again after a lost connection, it may find itself done. */
class ChangeExchange implements Exchange {
  readonly #request: Extract<Request, { action: "mkdir" | "remove" }>;
  readonly #onFailure: (error: RepriseError) => void;
  #asked = 0;

  constructor(request: Extract<Request, { action: "mkdir" | "remove" }>, onFailure: (error: RepriseError) => void) {
    this.#request = request;
    this.#onFailure = onFailure;
  }

  ask(peer: Peer): Promise<void> {
    this.#asked++;
    return peer.ask(this.#request);
  }

  async take(peer: Peer): Promise<boolean> {
    await peer.expect("end");
    peer.progress = true;
    return false;
  }

  failed(error: RepriseError): void {
    const isDone = this.#asked > 1 && this.#request.action === "remove" && error.code === "not_found";
    if (!isDone) this.#onFailure(error);
  }
}

/** What the server has under these names; those that are not there are told to `missing`, if anybody wants to know. */
async function lookRemotely(
  remote: Remote,
  roots: RemoteRoot[],
  missing?: (error: RepriseError) => void,
): Promise<Item[]> {
  const looks = roots.map((root) => new Look(root));
  await remote.run([...looks]);
  return looks.flatMap(({ item, error }) => {
    if (item) return item;
    if (missing) missing(error!);
    else if (error!.code !== "not_found") throw error;
    return [];
  });
}

class Look implements Exchange {
  readonly #root: RemoteRoot;
  item: Item | undefined;
  error: RepriseError | undefined;

  constructor(root: RemoteRoot) {
    this.#root = root;
  }

  ask(peer: Peer): Promise<void> {
    return peer.ask({ action: "stat", path: this.#root.path });
  }

  async take(peer: Peer): Promise<boolean> {
    const { kind, size, mtime } = await peer.expect("meta");
    this.item = { path: this.#root.name, remote: this.#root.path, kind, size, mtime };
    return false;
  }

  failed(error: RepriseError): void {
    this.error = error;
  }
}

// ---------------------------------------------------------------------------------------------------- local

/** What is there locally, under a path relative to the folder that was walked. */
export interface LocalEntry {
  path: string;
  kind: EntryKind;
  size: number;
  mtime: number;
}

/** As PUT's fields for what is new and comes in one go. */
const NEW_FILE = { action: "put", id: "", offset: 0, noClobber: false, parents: true, etag: "" } as const;

/** A local folder as something to write the way a root is written, with a staging folder of this process's own. */
class LocalFolder {
  readonly changes: Changes;
  readonly #path: string;
  readonly #staging = `.reprise-${process.pid}-${crypto.randomUUID().slice(0, 8)}`;
  readonly #isNew: boolean;

  constructor(path: string) {
    const found = lookAt(path);
    if (found && !found.isDirectory()) throw new RepriseError("local", `not a folder: ${quote(path)}`);
    this.#path = path;
    this.#isNew = !found;
    try {
      if (found) sweepStaging(path);
      this.changes = openChanges(path, {
        staging: this.#staging,
        wrap: (error, name) => asLocal(error, join(path, name)),
        versions: false,
      });
    } catch (error) {
      throw asLocal(error, path);
    }
  }

  /** Where nothing came, nothing is left either, unless that is all there was to come. */
  async leave(isComplete: boolean): Promise<void> {
    await this.changes.leave(this.#path, this.#staging);
    if (!isComplete && this.#isNew && readdirSync(this.#path).length === 0) rmdirSync(this.#path);
  }
}

/** Removes what ended processes have left there. */
function sweepStaging(folder: string): void {
  for (const name of readdirSync(folder)) {
    const pid = /^\.reprise-(\d+)-[0-9a-f]+$/.exec(name)?.[1];
    if (pid && !isRunning(Number(pid))) rmSync(join(folder, name), { recursive: true, force: true });
  }
}

/** The names in a folder's folders, each read once: most files need no look of their own. */
class LocalNames {
  readonly #root: string;
  readonly #known = new Map<string, Set<string>>();

  constructor(root: string) {
    this.#root = root;
  }

  has(path: string): boolean {
    const slash = path.lastIndexOf("/");
    return this.#in(path.slice(0, Math.max(0, slash))).has(path.slice(slash + 1));
  }

  #in(folder: string): Set<string> {
    const known = this.#known.get(folder);
    if (known) return known;
    if (this.#known.size >= MAX_KNOWN_FOLDERS) this.#known.clear();
    const names = readNames(join(this.#root, folder));
    this.#known.set(folder, names);
    return names;
  }
}

/** None where there is no such folder: making it says why. */
function readNames(folder: string): Set<string> {
  try {
    return new Set(readdirSync(folder));
  } catch {
    return new Set();
  }
}

/** Undefined for what is not there; links and devices have a kind that nothing has. Throws `local`. */
function lookLocally(file: string): (Omit<LocalEntry, "kind"> & { kind: EntryKind | "other" }) | undefined {
  const stat = lstatIfThere(file);
  if (!stat) return undefined;
  const kind = stat.isFile() ? "file" : stat.isDirectory() ? "folder" : "other";
  return { path: file, kind, size: Number(stat.size), mtime: Number(stat.mtimeNs / 1000n) };
}

function lstatIfThere(file: string) {
  try {
    return lstatSync(file, { bigint: true, throwIfNoEntry: false });
  } catch (error) {
    // Below a file that has a folder's name there is nothing, either.
    if (errorCode(error) === "ENOTDIR") return undefined;
    throw asLocal(error, file);
  }
}

/**
 * Files and folders below `root`, a folder before what is in it. `enter` tells whether to look into a folder; what is
 * neither, or left by an unfinished transfer, is told to `leftOut`.
 */
function* walk(
  root: string,
  enter: (path: string) => boolean = () => true,
  leftOut: () => void = () => {},
  failures = new Failures(),
): Generator<LocalEntry> {
  const waiting = [""];
  for (let folder = waiting.pop(); folder !== undefined; folder = waiting.pop()) {
    for (const name of namesIn(join(root, folder), failures)) {
      const path = remoteJoin(folder, name);
      const found = lookLocally(join(root, path));
      if (!found)
        failures.add(new RepriseError("local", `cannot read ${quote(join(root, path))}: it is not there any more`));
      else if (found.kind === "other" || isHidden(name) || isUnfinished(name)) leftOut();
      else {
        if (found.kind === "folder" && enter(path)) waiting.push(path);
        yield { path, kind: found.kind, size: found.size, mtime: found.mtime };
      }
    }
  }
}

function holdsUnfinished(folder: string): boolean {
  return (readdirSync(folder, { recursive: true }) as string[]).some(isUnfinished);
}

function namesIn(folder: string, failures: Failures): string[] {
  try {
    return readdirSync(folder);
  } catch (error) {
    failures.add(asLocalSource(error, folder));
    return [];
  }
}

/** A small file's content. Throws `local`, also if it changes meanwhile. */
function readSmall(file: string): { content: Uint8Array; mtime: number } {
  let fd: number;
  try {
    fd = openSync(file, constants.O_RDONLY | constants.O_NONBLOCK | constants.O_NOFOLLOW);
  } catch (error) {
    throw asLocalSource(error, file);
  }
  try {
    const before = fstatSync(fd, { bigint: true });
    const size = Number(before.size);
    if (!before.isFile() || size > MAX_WHOLE_BYTES) throw new SourceChanged(file);
    // One byte more would show that it has grown.
    const content = Buffer.allocUnsafe(size + 1);
    if (readSync(fd, content, 0, size + 1, 0) !== size) throw new SourceChanged(file);
    const mtime = Number(before.mtimeNs / 1000n);
    if (fstatSync(fd, { bigint: true }).mtimeNs !== before.mtimeNs) throw new SourceChanged(file);
    return { content: content.subarray(0, size), mtime };
  } catch (error) {
    throw asLocalSource(error, file);
  } finally {
    closeSync(fd);
  }
}

/** Whether a local file has these checksums, and no more. */
async function sameContent(sums: { length: number; crc32: number }[], file: string): Promise<boolean> {
  const fd = openSync(file, constants.O_RDONLY);
  try {
    let at = 0;
    for (const { length, crc32 } of sums) {
      if ((await crc32Of(fd, at, length)) !== crc32) return false;
      at += length;
    }
    return at === fstatSync(fd).size;
  } finally {
    closeSync(fd);
  }
}

function localProblem(error: RepriseError): RepriseError {
  return error.code === "local" ? error : new RepriseError("local", error.message, error);
}

function emptySource(path: string, where: string): RepriseError {
  return new RepriseError(
    "usage",
    `${quote(path)} is empty ${where}: everything would be removed; --force does it all the same`,
  );
}

/** `12 files, 3.4 MB; 100 unchanged, 2 removed`. */
export function summary({ files, bytes, unchanged, removed }: Tally): string {
  const done = `${files} ${files === 1 ? "file" : "files"}, ${formatSize(bytes)}`;
  return `${done}; ${unchanged} unchanged${removed > 0 ? `, ${removed} removed` : ""}`;
}
