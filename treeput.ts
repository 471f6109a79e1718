/**
 * Folders and many files to the server: what of them differs is sent while the folders are still being looked through.
 *
 * A small file is one frame; a large one goes on where it was cut. Nothing on the server is removed unless everything else
 * went well.
 */
import { closeSync, constants, fstatSync, openSync, readSync, statSync } from "node:fs";
import { basename, join, resolve } from "node:path";
import { say } from "./command.ts";
import { type Context, remoteJoin } from "./context.ts";
import type { Peer } from "./peer.ts";
import type { Exchange } from "./pipeline.ts";
import {
  type Entry,
  MAX_CONTENT_BYTES,
  MAX_WHOLE_BYTES,
  type Meta,
  quote,
  RepriseError,
  type Request,
  splitPath,
} from "./protocol.ts";
import { asLocalSource, FileSource, SourceChanged } from "./source.ts";
import { holdsOnlyLogs, UploadLog } from "./transfer.ts";
import {
  emptySource,
  type LocalEntry,
  type LocalRoot,
  lookRemotely,
  MAX_GROUP,
  NEW_FILE,
  sameContent,
  type Tally,
  Transfer,
  type TreeOptions,
  walk,
} from "./tree.ts";
import { UploadExchange, type UploadHooks } from "./upload.ts";

/** Brings files, and folders with all that is in them, to the folder `path` on the server. */
export function putAll(context: Context, roots: LocalRoot[], path: string, options: TreeOptions): Promise<Tally> {
  return new TreeUpload(context, roots, path, options).run();
}

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
  /** The folder that has those of uploads. */
  readonly #logs: string;
  #isRootThere = false;
  #leftOut = 0;

  constructor(context: Context, roots: LocalRoot[], path: string, options: TreeOptions) {
    super(context, options);
    this.#roots = roots;
    this.#path = path;
    this.#logs = resolve(options.directory);
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
      const isForLogs = (path: string) => resolve(root.file, path) === this.#logs && holdsOnlyLogs(this.#logs);
      const enter = (path: string) => !isForLogs(path);
      for (const entry of walk(root.file, enter, () => this.#leftOut++, this.failures)) {
        if (entry.kind === "folder" && isForLogs(entry.path)) continue;
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
