/**
 * Brings a member's tree to what the ledger's records say: content from elsewhere in the tree, or fetched from a member that
 * has it, then staged, checked, and renamed as the server does with an upload (changes.ts).
 *
 * Nothing is replaced or removed that is not what the index knows of: then the tree is looked at once more, and replica.ts
 * says what comes of that. What cannot be done is tried again later, and said in `status` until then.
 */
import { fstatSync } from "node:fs";
import { type FolderChange, type FolderChanges, type FolderUpload, type Outcome, PUT_AGAIN } from "./changes.ts";
import { say } from "./command.ts";
import { nextTurn } from "./connection.ts";
import { readFully, setTime } from "./disk.ts";
import type { Index } from "./index.ts";
import { hasSameContent, type Record } from "./ledger.ts";
import { checkMeta, type Peer } from "./peer.ts";
import type { Exchange } from "./pipeline.ts";
import { MAX_CONTENT_BYTES, type Meta, type Put, quote, RepriseError, TO_THE_END } from "./protocol.ts";
import type { Remote } from "./remote.ts";
import { conflictName, type Entry, type Event, isWanted, type State } from "./replica.ts";
import type { Target } from "./resume.ts";
import { errorCode, type Folder, metaOf } from "./storage.ts";

/** Records that are gone about together. */
const MAX_ROUND = 256;
/** Large files that come at a time, beside the small ones. */
const MAX_LARGE = 2;
/** The wait before what failed is tried again, longer each time. */
const FIRST_RETRY_MS = 100;
const LAST_RETRY_MS = 5_000;
/** A folder that stays full for so many attempts is kept. */
const TRIES_FULL = 5;
/** What nobody has is soon superseded, as a rule; after so many attempts it is a problem. */
const TRIES_UNSAID = 5;
/** What nobody has, with everyone there, is given up after so many. */
const TRIES_NOBODY = 30;
/** A server that is about to end waits for whoever is connected to it, as if that were at work: nobody stays for nothing. */
const IDLE_MS = 500;
const HASH_BYTES = 1024 * 1024;
/** A file's version on the wire: so many hexadecimal digits of its sha256. */
const DIGEST_LENGTH = 32;

export function digestEtag(sha256: string): string {
  return sha256.slice(0, DIGEST_LENGTH);
}

export interface PlacerOptions {
  root: Folder;
  changes: FolderChanges;
  index: Index;
  state: State;
  /** Where a record's content may be had, the likeliest first. */
  holdersOf(record: Record): string[];
  connectTo(address: string): Remote;
  take(events: Event[]): void;
  /** Every member is there that could have what is missing, and this is the one to say that nobody has it. */
  isEveryoneHere(): boolean;
  /** Looks at what the tree has there. */
  examine(paths: string[]): void;
}

/** A record that the tree does not have yet. */
interface Want {
  record: Record;
  /** What the tree has in its place. */
  etag: string;
  tries: number;
  /** Where its bytes go, since a file has the name of a folder that it is in. */
  elsewhere?: string;
}

export class Placer {
  readonly #options: PlacerOptions;
  readonly #wanted = new Map<string, Want>();
  /** Waiting for their next try. */
  readonly #later = new Map<string, Want>();
  readonly #large = new Map<string, Want>();
  /** Being placed, each until the index knows of it. */
  readonly #applying = new Map<string, Promise<void>>();
  readonly #problems = new Map<string, string>();
  readonly #remotes = new Map<string, Remote>();
  #letGoTimer: Timer | undefined;
  #isWorking = false;
  #isClosed = false;

  constructor(options: PlacerOptions) {
    this.#options = options;
  }

  /** What keeps the tree behind, in one line. */
  get problem(): string | undefined {
    // What was set right in some other way is none any more.
    for (const path of [...this.#problems.keys()]) if (!this.#options.index.get(path)?.target) this.#noProblem(path);
    const [first] = this.#problems.values();
    const others = this.#problems.size - 1;
    return first && others > 0 ? `${first} (and ${others} more)` : first;
  }

  /** Said when there is the first, and when there is none again: between them `status` has them all. */
  #setProblem(path: string, text: string): void {
    if (this.#problems.size === 0) say("warn", `${text}; it is tried again, and status says how far it is`);
    this.#problems.set(path, text);
  }

  #noProblem(path: string): void {
    if (this.#problems.delete(path) && this.#problems.size === 0)
      say("info", "nothing keeps the files here behind any more");
  }

  want(record: Record, etag: string): void {
    const before = this.#wanted.get(record.path) ?? this.#later.get(record.path);
    this.#later.delete(record.path);
    const tries = before?.record.revision === record.revision ? before.tries : 0;
    this.#wanted.set(record.path, { record, etag, tries });
    this.#work();
  }

  /** Gives what lost a conflict its other name. */
  async aside(path: string, etag: string, to: string): Promise<void> {
    for (let number = 1; number < 1000; number++) {
      const name = number === 1 ? to : numbered(to, number);
      const [outcome] = await this.#make([{ action: "aside", path, etag, to: name }]);
      if (outcome instanceof RepriseError && outcome.code === "exists") continue;
      const isProblem =
        outcome instanceof RepriseError && !UNEXPECTED.has(outcome.code) && outcome.code !== "not_found";
      if (isProblem) this.#setProblem(path, outcome.message);
      if (!(outcome instanceof RepriseError))
        say("warn", `${quote(path)} is another version in the cluster; the one from here is now ${quote(name)}`);
      return this.#options.examine([path, name]);
    }
  }

  /** Everything that waits is tried at once: somebody has come who may have it. */
  hurry(): void {
    for (const want of this.#later.values()) this.#wanted.set(want.record.path, want);
    this.#later.clear();
    this.#work();
  }

  /** Resolves when none of these is being placed. */
  async applied(paths: string[]): Promise<void> {
    for (;;) {
      const waiting = paths.map((path) => this.#applying.get(path)).filter((applying) => applying !== undefined);
      if (waiting.length === 0) return;
      await Promise.all(waiting);
    }
  }

  /** Lets go of connections. */
  close(): void {
    this.#isClosed = true;
    clearTimeout(this.#letGoTimer);
    for (const remote of this.#remotes.values()) remote.giveUp();
  }

  async #work(): Promise<void> {
    if (this.#isWorking) return;
    this.#isWorking = true;
    // What is wanted together goes together.
    await Promise.resolve();
    while (this.#wanted.size > 0 && !this.#isClosed) await this.#round();
    this.#isWorking = false;
    clearTimeout(this.#letGoTimer);
    this.#letGoTimer = setTimeout(() => this.#letGo(), IDLE_MS);
  }

  #letGo(): void {
    if (this.#isWorking || this.#large.size > 0) return;
    for (const remote of this.#remotes.values()) remote.close();
    this.#remotes.clear();
  }

  async #round(): Promise<void> {
    const round: Want[] = [];
    for (const [path, want] of this.#wanted) {
      if (round.length >= MAX_ROUND) break;
      const { kind, size } = want.record;
      const isLarge = kind === "file" && size > MAX_CONTENT_BYTES;
      if (isLarge && (this.#large.has(path) || this.#large.size >= MAX_LARGE)) continue;
      this.#wanted.delete(path);
      if (isLarge) this.#placeLarge(want);
      else round.push(want);
    }
    const of = (kind: Record["kind"]) => round.filter(({ record }) => record.kind === kind);
    // All that is left is large, and waits for its turn.
    if (round.length === 0) return void (await new Promise((resolve) => setTimeout(resolve, FIRST_RETRY_MS)));
    await this.#placeFolders(of("folder").sort(byPath));
    await this.#placeFiles(of("file"));
    await this.#clear(of("gone").sort(byPath).reverse());
  }

  // ------------------------------------------------------------------------------------------------ folders, deletions

  async #placeFolders(wants: Want[]): Promise<void> {
    const inTheWay = wants.filter((want) => want.etag !== "" && this.#isWanted(want));
    // What keeps it there keeps the folder away, which is then told.
    await this.#make(inTheWay.map(({ record: { path }, etag }) => ({ action: "clear", path, etag })));
    await this.#apply(
      wants,
      wants.map(({ record: { path } }) => ({ action: "mkdir", path, parents: true })),
    );
  }

  #clear(all: Want[]): Promise<void> {
    const wants = this.#withoutNeeded(all);
    return this.#apply(
      wants,
      wants.map(({ record: { path }, etag }) => ({ action: "clear", path, etag })),
    );
  }

  /** What is still to be copied to another name goes later. */
  #withoutNeeded(wants: Want[]): Want[] {
    if (wants.length === 0) return wants;
    const needed = new Set<string>();
    for (const waiting of [this.#wanted, this.#later, this.#large])
      for (const { record } of waiting.values()) if (record.kind === "file") needed.add(record.sha256);
    return wants.filter((want) => {
      const isNeeded = needed.has(this.#options.index.get(want.record.path)?.seen.sha256 ?? "");
      if (isNeeded) this.#tryLater({ ...want, tries: 0 });
      return !isNeeded;
    });
  }

  // ------------------------------------------------------------------------------------------------ files

  async #placeFiles(all: Want[]): Promise<void> {
    const wants = await this.#withoutFolders(all);
    const staged: { want: Want; upload: FolderUpload }[] = [];
    const toFetch = new Map<string, Fetch[]>();
    const failed = (want: Want, error: unknown) => this.#failed(want, error);
    for (const want of wants) {
      try {
        if (await this.#retime(want)) continue;
        const upload = await this.#copy(want);
        if (upload) staged.push({ want, upload });
        else {
          const { changes } = this.#options;
          const take = (upload: FolderUpload) => void staged.push({ want, upload });
          const holder = this.#holderOf(want);
          toFetch.set(holder, [
            ...(toFetch.get(holder) ?? []),
            new Fetch(changes, this.#putOf(want), want, take, failed),
          ]);
        }
      } catch (error) {
        failed(want, error);
      }
    }
    for (const [holder, fetches] of toFetch) {
      // What a lost connection leaves is told to each by itself.
      await this.#remoteOf(holder)
        .run([...fetches])
        .catch((error) => {
          for (const fetch of fetches) fetch.failed(error);
        });
    }
    try {
      await this.#apply(
        staged.map(({ want }) => want),
        staged.map(({ upload }) => upload),
      );
    } finally {
      for (const { upload } of staged) upload.close();
    }
  }

  /** Folders in the way of files go, where they are empty; returns those that have nothing in their way. */
  async #withoutFolders(wants: Want[]): Promise<Want[]> {
    const { index } = this.#options;
    const free: Want[] = [];
    for (const want of wants) {
      const { path } = want.record;
      const isFolder = index.get(path)?.seen.kind === "folder";
      const [outcome] = isFolder ? await this.#make([{ action: "clear", path, etag: "" }]) : [];
      if (outcome instanceof RepriseError) this.#failed(want, outcome);
      else free.push(want);
    }
    return free;
  }

  async #placeLarge(want: Want): Promise<void> {
    const { path } = want.record;
    this.#large.set(path, want);
    let upload: FolderUpload | undefined;
    try {
      if ((await this.#withoutFolders([want])).length === 0) return;
      if (await this.#retime(want)) return;
      upload = (await this.#copy(want)) ?? (await this.#download(want));
      await this.#apply([want], [upload]);
    } catch (error) {
      this.#failed(want, error);
    } finally {
      upload?.close();
      this.#large.delete(path);
      this.#work();
    }
  }

  async #download(want: Want): Promise<FolderUpload> {
    const { record } = want;
    const { changes } = this.#options;
    const id = digestEtag(record.sha256);
    const held = Math.min(changes.held(id), record.size);
    // Not fetched again and again up to where the disk is full, and small ones still find room.
    if (record.size - held > changes.freeBytes) {
      changes.forget(id);
      throw new RepriseError("no_room", `no room on the server for ${quote(record.path)} (${record.size} bytes)`);
    }
    const target = new StagedTarget(changes, { ...this.#putOf(want), id, offset: held });
    try {
      await this.#remoteOf(this.#holderOf(want)).download(record.path, target);
      await target.settle();
      if ((await sha256Of(target.upload.fd, record.size)) === record.sha256) return target.upload;
      target.upload.drop();
      throw damaged(record);
    } catch (error) {
      if (error instanceof RepriseError && error.code === "no_room") target.upload.drop();
      target.upload.close();
      throw error;
    }
  }

  /** The same content with another time is not written again. */
  async #retime({ record, etag }: Want): Promise<boolean> {
    const { root, index, take } = this.#options;
    const entry = index.get(record.path);
    if (!entry || !hasSameContent(entry.seen, record) || entry.etag !== etag) return false;
    const file = await root.open(record.path);
    try {
      // From this look on nothing is waited for: whatever else becomes of the file must not pass for what was placed.
      if (file.fd === undefined || root.look(record.path)?.etag !== etag) return false;
      setTime(file.fd, record.mtime);
      const now = metaOf(fstatSync(file.fd, { bigint: true }), record.path);
      take([{ kind: "placed", record, etag: now.etag }]);
      return true;
    } catch (error) {
      // It is somebody else's, and only its owner may set its time: it is written again.
      if (errorCode(error) === "EPERM") return false;
      throw error;
    } finally {
      file.close();
    }
  }

  /** Content that the tree has under another name moves no bytes between members. */
  async #copy(want: Want): Promise<FolderUpload | undefined> {
    const { index } = this.#options;
    for (const entry of index.withContent(want.record.sha256)) {
      const upload = await this.#copyFrom(entry, want);
      if (upload) return upload;
    }
    return undefined;
  }

  async #copyFrom({ path, etag }: Entry, want: Want): Promise<FolderUpload | undefined> {
    const { root, changes } = this.#options;
    if (root.look(path)?.etag !== etag) return undefined;
    const file = await root.open(path);
    let upload: FolderUpload | undefined;
    try {
      const { size } = file.meta;
      if (file.meta.etag !== etag || size !== want.record.size) return undefined;
      upload = changes.receive(this.#putOf(want), true);
      const hasher = new Bun.CryptoHasher("sha256");
      for (let at = 0; at < size; at += HASH_BYTES) {
        const chunk = await file.read(at, Math.min(HASH_BYTES, size - at));
        hasher.update(chunk);
        await upload.append(chunk, Bun.hash.crc32(chunk), () => {});
        await nextTurn();
      }
      await upload.settle();
      if (hasher.digest("hex") === want.record.sha256) return upload;
    } catch (error) {
      upload?.close();
      throw error;
    } finally {
      file.close();
    }
    upload.close();
    return undefined;
  }

  #putOf({ record, etag, elsewhere }: Want): Put {
    const { size, mtime } = record;
    const path = elsewhere ?? record.path;
    const isThere = etag !== "" && !elsewhere;
    return {
      action: "put",
      path,
      id: "",
      offset: 0,
      size,
      mtime,
      noClobber: !isThere,
      etag: isThere ? etag : "",
      parents: true,
    };
  }

  #holderOf({ record, tries }: Want): string {
    const holders = this.#options.holdersOf(record);
    const holder = holders[tries % holders.length];
    if (holder === undefined) throw new RepriseError("lost", `nobody is there who has ${quote(record.path)}`);
    return holder;
  }

  #remoteOf(holder: string): Remote {
    const remote = this.#remotes.get(holder) ?? this.#options.connectTo(holder);
    this.#remotes.set(holder, remote);
    return remote;
  }

  // ------------------------------------------------------------------------------------------------ outcomes

  /** Makes the changes of what is still wanted: something may have come since that has taken its place. */
  async #apply(all: Want[], changesOfAll: FolderChange[]): Promise<void> {
    const still = [...all.entries()].filter(([, want]) => this.#isWanted(want));
    if (still.length === 0) return;
    const wants = still.map(([, want]) => want);
    const changes = still.map(([at]) => changesOfAll[at]!);
    const { promise, resolve } = Promise.withResolvers<void>();
    for (const { record } of wants) this.#applying.set(record.path, promise);
    try {
      await this.#applyNow(wants, changes);
    } finally {
      for (const { record } of wants) this.#applying.delete(record.path);
      resolve();
    }
  }

  async #applyNow(wants: Want[], changes: FolderChange[]): Promise<void> {
    const outcomes = await this.#make(changes, (at) => this.#isWanted(wants[at]!));
    const events: Event[] = [];
    for (const [index, want] of wants.entries()) {
      const outcome = outcomes[index];
      // Another member may have given it the same other name.
      const isThere = want.elsewhere && outcome instanceof RepriseError && outcome.code === "exists";
      if (outcome instanceof Error && !isThere) this.#failed(want, outcome);
      else events.push(this.#placed(want, outcome));
    }
    if (events.length > 0) this.#options.take(events);
  }

  /** Each has its outcome, whatever happens. */
  #make(changes: FolderChange[], isWanted?: (at: number) => boolean): Promise<Outcome[]> {
    return this.#options.changes.apply(changes, isWanted).catch((error) => changes.map(() => error as RepriseError));
  }

  #isWanted({ record, etag }: Want): boolean {
    return isWanted(this.#options.state, { kind: "place", record, etag });
  }

  #placed({ record, elsewhere }: Want, outcome: Outcome): Event {
    if (elsewhere) this.#options.examine([elsewhere]);
    if (elsewhere) return { kind: "kept", record };
    return { kind: "placed", record, etag: (outcome as Meta | undefined)?.etag ?? "" };
  }

  #failed(want: Want, cause: unknown): void {
    const { record } = want;
    const error = asProblem(record, cause);
    const { code } = error;
    const isFull = code === "exists" && this.#options.index.get(record.path)?.seen.kind === "folder";
    if (isFull && want.tries >= TRIES_FULL) void this.#keepFull(record);
    else if (code === "not_a_folder" && want.tries >= TRIES_FULL && this.#giveWay(want)) return;
    else if (NOWHERE.has(code) && want.tries >= TRIES_NOBODY && this.#options.isEveryoneHere())
      this.#options.take([{ kind: "kept", record }]);
    else if (UNEXPECTED.has(code)) this.#options.examine([record.path]);
    else if (!UNSAID.has(code) || want.tries >= TRIES_UNSAID) this.#setProblem(record.path, problemOf(error));
    this.#tryLater(want);
  }

  /**
   * A folder with something in it that is not about to go: it stays, or makes way for a file as a whole, under the same name
   * on all members, since several may do so before they hear of each other.
   */
  async #keepFull(record: Record): Promise<void> {
    const { index, take, examine } = this.#options;
    for (const { target } of index.below(record.path)) if (target) return;
    if (record.kind === "gone") take([{ kind: "kept", record }]);
    else await this.aside(record.path, "", conflictName(record.path, record.origin, record));
    examine([record.path]);
  }

  /**
   * The log has a file, and something in a folder of its name: the bytes go beside it, on all members under the same name,
   * and where they were to be there is nothing. False where that will still be sorted out.
   */
  #giveWay(want: Want): boolean {
    const { record } = want;
    const { index, take } = this.#options;
    const { path, origin } = record;
    for (let at = path.indexOf("/"); at > 0; at = path.indexOf("/", at + 1)) {
      const obstacle = index.get(path.slice(0, at));
      if (obstacle?.seen.kind !== "file") continue;
      if (obstacle.target) return false;
      if (record.kind !== "file") take([{ kind: "kept", record }]);
      else {
        const elsewhere = conflictName(obstacle.path, origin, record) + path.slice(at);
        this.#wanted.set(path, { ...want, elsewhere, tries: 0 });
        this.#work();
      }
      return true;
    }
    return false;
  }

  #tryLater(want: Want): void {
    const { path } = want.record;
    if (this.#wanted.has(path) || this.#isClosed) return;
    const next = { ...want, tries: want.tries + 1 };
    this.#later.set(path, next);
    setTimeout(
      () => {
        if (this.#later.get(path) !== next) return;
        this.#later.delete(path);
        this.#wantAgain(next);
      },
      Math.min(LAST_RETRY_MS, FIRST_RETRY_MS * 2 ** want.tries),
    );
  }

  /** If it is still what is to be done. */
  #wantAgain(want: Want): void {
    const entry = this.#options.index.get(want.record.path);
    if (entry?.target?.revision !== want.record.revision) return;
    this.#wanted.set(want.record.path, { ...want, etag: entry.etag });
    this.#work();
  }
}

/** The tree is not what the index says. */
const UNEXPECTED: ReadonlySet<string> = new Set(["changed", "exists", "not_a_file", "not_a_folder"]);
/** What may be so for a moment: the holder has it not yet, or has something newer. */
const UNSAID: ReadonlySet<string> = new Set([
  "not_found",
  "lost",
  "timeout",
  "idle",
  "busy",
  "shutting_down",
  "in_use",
]);

/** Nobody who was asked has it. */
const NOWHERE: ReadonlySet<string> = new Set(["not_found", "lost"]);

/** A small file on its way here. */
class Fetch implements Exchange {
  readonly #changes: FolderChanges;
  readonly #put: Put;
  readonly #want: Want;
  readonly #take: (upload: FolderUpload) => void;
  readonly #onFailure: (want: Want, error: unknown) => void;
  #isDone = false;

  constructor(
    changes: FolderChanges,
    put: Put,
    want: Want,
    take: (upload: FolderUpload) => void,
    onFailure: (want: Want, error: unknown) => void,
  ) {
    this.#changes = changes;
    this.#put = put;
    this.#want = want;
    this.#take = take;
    this.#onFailure = onFailure;
  }

  /** Of whatever version: the digest tells whether it is the one. */
  ask(peer: Peer): Promise<void> | undefined {
    return peer.askNow({ action: "get", path: this.#put.path, offset: 0, length: TO_THE_END, etag: "" });
  }

  async take(peer: Peer): Promise<boolean> {
    const answer = await peer.expectHeld("meta", "file");
    const { record } = this.#want;
    if (answer.type === "file") {
      const isRight = Bun.SHA256.hash(answer.content, "hex") === record.sha256;
      if (!isRight) throw superseded(record);
      this.#keep((upload) => upload.write(answer.content));
      return false;
    }
    checkMeta(answer, answer.offset, { offset: 0, etag: "" });
    const chunks: Uint8Array[] = [];
    const receiver = {
      bytes: 0,
      async append(chunk: Uint8Array, _: number, free: (chunk: Uint8Array) => void) {
        chunks.push(chunk.slice());
        receiver.bytes += chunk.length;
        free(chunk);
      },
    };
    if (answer.size > MAX_CONTENT_BYTES) {
      // It has grown meanwhile.
      await peer.skip();
      throw superseded(record);
    }
    await peer.receive(receiver, answer.size);
    const content = Buffer.concat(chunks);
    if (Bun.SHA256.hash(content, "hex") !== record.sha256) throw superseded(record);
    this.#keep((upload) => upload.write(content));
    return false;
  }

  failed(error: RepriseError): void {
    if (!this.#isDone) this.#onFailure(this.#want, error);
    this.#isDone = true;
  }

  #keep(write: (upload: FolderUpload) => void): void {
    const upload = this.#changes.receive(this.#put, true);
    try {
      write(upload);
    } catch (error) {
      upload.close();
      throw error;
    }
    this.#isDone = true;
    this.#take(upload);
  }
}

/** A large file on its way here: staged under a name of its content, so that it goes on after any interruption. */
class StagedTarget implements Target {
  readonly etag: string;
  readonly end = undefined;
  readonly restartable = true;
  readonly #changes: FolderChanges;
  readonly #put: Put;
  upload: FolderUpload;

  constructor(changes: FolderChanges, put: Put) {
    this.#changes = changes;
    this.#put = put;
    this.etag = put.id;
    this.upload = changes.receive(put, true);
  }

  get bytes(): number {
    return this.upload.bytes;
  }

  /** Another version than that of the record is of no use. */
  begin({ etag }: Meta): void {
    if (etag !== this.etag) throw new RepriseError("not_found", `superseded: ${quote(this.#put.path)}`);
  }

  append(chunk: Uint8Array, crc32: number, free: (chunk: Uint8Array) => void): Promise<void> {
    return this.upload.append(chunk, crc32, free);
  }

  settle(): Promise<void> {
    return this.upload.settle();
  }

  reset(): void {
    this.upload.close();
    this.upload = this.#changes.receive({ ...this.#put, offset: 0 }, true);
  }
}

async function sha256Of(fd: number, size: number): Promise<string> {
  const hasher = new Bun.CryptoHasher("sha256");
  const buffer = new Uint8Array(Math.min(HASH_BYTES, size));
  for (let at = 0; at < size; at += buffer.length) {
    const piece = buffer.subarray(0, Math.min(buffer.length, size - at));
    await readFully(fd, piece, at);
    hasher.update(piece);
    await nextTurn();
  }
  return hasher.digest("hex");
}

/** Nobody has to put it again: it comes as soon as it can. */
function problemOf({ message }: RepriseError): string {
  return message.replace(PUT_AGAIN, "");
}

function superseded({ path }: Record): RepriseError {
  return new RepriseError("not_found", `not the version that was asked for: ${quote(path)}`);
}

/** What the system refuses concerns one file, not the keeper; throws all else, of the index, too. */
function asProblem({ path }: Record, error: unknown): RepriseError {
  if (error instanceof RepriseError) return error;
  if (!/^E[A-Z0-9]+$/.test(errorCode(error))) throw error;
  return new RepriseError("failed", `${quote(path)}: ${(error as Error).message}`, error);
}

function damaged({ path }: Record): RepriseError {
  return new RepriseError("failed", `what came of ${quote(path)} does not have its sha256; it is fetched again`);
}

function byPath(a: Want, b: Want): number {
  return a.record.path < b.record.path ? -1 : 1;
}

/** `a.conflict-1-2.txt` as `a.conflict-1-2-3.txt`. */
function numbered(path: string, number: number): string {
  const dot = path.lastIndexOf(".");
  return path.lastIndexOf(".conflict-") === dot
    ? `${path}-${number}`
    : `${path.slice(0, dot)}-${number}${path.slice(dot)}`;
}
