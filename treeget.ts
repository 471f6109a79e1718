/**
 * Folders and many files from the server: what of them differs is fetched while the lists still come.
 *
 * Small files are written as the server writes its own, staged, synced in groups, renamed (changes.ts); large ones have a
 * part and a log, as single ones do. Nothing local is removed unless everything else went well.
 */
import { readdirSync, realpathSync, rmdirSync, rmSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { type FolderChange, type FolderChanges, type FolderUpload, openChanges } from "./changes.ts";
import { say } from "./command.ts";
import { type Context, remoteJoin } from "./context.ts";
import { isRunning } from "./disk.ts";
import { checkMeta, type Peer, type Receiver, unexpected } from "./peer.ts";
import { Dropped, type Exchange } from "./pipeline.ts";
import { ERRORS, MAX_CONTENT_BYTES, type Meta, quote, RepriseError, splitPath, TO_THE_END } from "./protocol.ts";
import type { Remote } from "./remote.ts";
import { asLocal, isUnfinished, LOG_SUFFIX, PartFile } from "./resume.ts";
import { isHidden } from "./storage.ts";
import { lookAt } from "./transfer.ts";
import {
  emptySource,
  type Item,
  type Known,
  lookLocally,
  lookRemotely,
  MAX_GROUP,
  NEW_FILE,
  type RemoteRoot,
  sameContent,
  type Tally,
  Transfer,
  type TreeOptions,
  walk,
} from "./tree.ts";

/** Local folders whose names are held in memory. */
const MAX_KNOWN_FOLDERS = 100;
/** What is left of a refused answer is received and forgotten up to here; beyond, another connection costs less. */
const MAX_SKIPPED_BYTES = 1024 * 1024;

/** Brings files, and folders with all that is in them, to the folder `local`. */
export function getAll(context: Context, roots: RemoteRoot[], local: string, options: TreeOptions): Promise<Tally> {
  return new Download(context, roots, local, options).run();
}

class Download extends Transfer {
  readonly #roots: RemoteRoot[];
  readonly #local: string;
  protected readonly name: string;
  #folder: LocalFolder | undefined;
  /** Whole files that wait for their name. */
  #group: { upload: FolderUpload; fetch: Fetch }[] = [];
  /** Parts that are open: at the prompt the next line may want them. */
  readonly parts = new Set<PartFile>();
  /** What the server has, kept only where other things are to be removed. */
  readonly #seen: Set<string> | undefined;
  #entries = 0;
  /** Where something of another kind was in the way. */
  readonly #cleared = new Set<string>();
  #isCut = false;
  #cuts = 0;
  #filesAtCut = 0;
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

  get changes(): FolderChanges {
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
  add(upload: FolderUpload, fetch: Fetch): Promise<void> | undefined {
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
    // What has come since the last cut counts as elsewhere: the attempts begin anew.
    if (this.tally.files > this.#filesAtCut) this.#cuts = 0;
    this.#filesAtCut = this.tally.files;
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
    splitPath(item.remote);
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

  async #change(change: FolderChange): Promise<void> {
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
    let answer: ReturnType<Peer["peekNow"]>;
    try {
      answer = peer.peekNow();
    } catch (error) {
      // It was here already, and is an error.
      return this.#startAgain(error);
    }
    if (answer?.type !== "file") return this.#takeAnswer(peer);
    peer.drop();
    return this.#takeWhole(peer, answer);
  }

  async #takeAnswer(peer: Peer): Promise<boolean> {
    try {
      await peer.peek();
      if (peer.peekNow()?.type === "file") return await this.#takeWhole(peer, await peer.expect("file"));
      const { kind, size, mtime, etag, offset } = await peer.expectHeld("meta");
      this.#meta = { kind, size, mtime, etag };
      checkMeta(this.#meta, offset, this.#asked);
      this.#offset ??= this.#part?.bytes ?? 0;
      const isSmall = !this.#part && size <= MAX_CONTENT_BYTES;
      return await (isSmall ? this.#takeSmall(peer, this.#meta) : this.#takeLarge(peer, this.#meta));
    } catch (error) {
      return this.#startAgain(error);
    }
  }

  /** With a part of a version that is no more; true for asking again. Throws what is something else. */
  #startAgain(error: unknown): true {
    const isChange = error instanceof RepriseError && error.code === "changed";
    // A part may know its version and hold nothing of it yet.
    const isBegun = this.#part && (this.#part.bytes > 0 || this.#asked.etag !== "");
    if (!isChange || !this.#part || !isBegun) throw error;
    if (++this.#restarts > this.#tree.context.remote.retries) {
      throw new RepriseError("changed", `${error.message}, again and again; get it when it is at rest`);
    }
    say("warn", `${error.message}; starting again`);
    this.#part.reset();
    this.#offset = undefined;
    return true;
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
  #takeWhole(
    peer: Peer,
    { kind, size, mtime, etag, content }: Meta & { content: Uint8Array },
  ): Promise<boolean> | boolean {
    if (this.#part && this.#part.bytes > 0)
      throw new RepriseError("bad_frame", "the server sends a whole file for a part");
    this.#part?.discard();
    this.#closePart();
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
    const [added, pace] = [this.#tree.add(upload, this), peer.pace(size)];
    return added || pace ? Promise.all([added, pace]).then(() => false) : false;
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

function localProblem(error: RepriseError): RepriseError {
  return error.code === "local" ? error : new RepriseError("local", error.message, error);
}

/** A local folder as something to write the way a root is written, with a staging folder of this process's own. */
class LocalFolder {
  readonly changes: FolderChanges;
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

function holdsUnfinished(folder: string): boolean {
  return (readdirSync(folder, { recursive: true }) as string[]).some(isUnfinished);
}
