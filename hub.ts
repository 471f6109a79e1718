/**
 * What the processes of one server say to each other about its cluster. A worker and the keeper (keeper.ts) speak through
 * the supervisor, which starts the keeper when it is wanted.
 *
 * Three parts: the messages; `KeeperHost`, the supervisor's side, which keeps the keeper going, hands on what is said, and
 * counts whose turn it is; and `Hub`, a worker's side, with the `Link`s that go through it and the `Versions` that it reads.
 */
import { createHash } from "node:crypto";
import type { Subprocess } from "bun";
import type { Connection } from "./connection.ts";
import type { IndexReader, Known } from "./index.ts";
import type { Record } from "./ledger.ts";
import { type LogFormat, log, logBug } from "./log.ts";
import {
  decodeRequest,
  type Entry,
  type ErrorCode,
  encodeError,
  encodeLinkText,
  type Frame,
  quote,
  RepriseError,
} from "./protocol.ts";
import { type Etags, isHidden } from "./storage.ts";
import { Tokens } from "./tokens.ts";

/** Where a server keeps what it knows of its cluster, in its root. */
export const INDEX = ".reprise/index.sqlite";
export const LEDGER = ".reprise/ledger.sqlite";
/** An etag of a file that the index knows: so much of its sha256. */
const ETAG_DIGITS = 32;
/** An index that could not be read is tried again after that. */
const REOPEN_MS = 1_000;
/** A change waits for what it is to be made on so long, and looks this often whether it is here. */
const CATCH_UP_MS = 10_000;
const CATCH_UP_POLL_MS = 5;
/** What a link may have to send that its peer does not take. */
const MAX_UNSENT_BYTES = 16 * 1024 * 1024;
/** A process that lived shorter than this is started again with a wait: none at first, then this, doubled each time. */
const YOUNG_MS = 1_000;
const FIRST_RESTART_MS = 50;
const LAST_RESTART_MS = 1_000;
/**
 * Without the last of the engine's compilers, in whose hands a keeper's short work among many system calls gets no faster:
 * after a start it took a quarter of the processor time that 10,000 files cost.
 */
const COMPILING = { BUN_JSC_useFTLJIT: "0" };

/** How the keeper is told what to keep: as JSON in the environment variable REPRISE_KEEPER. */
export interface KeeperSettings {
  root: string;
  host: string;
  port: number;
  tls: boolean;
  /** `host:port` of the server to join. */
  join?: string | undefined;
  /** Where the ledger is kept outside of the servers, `etcd://host:port/NAME`; `join` is not given then. */
  cluster?: string | undefined;
  /** It has no files, and only sends clients on. */
  redirectOnly?: boolean;
  /** `host:port` that clients are told; made of `host` and `port` if not given. */
  advertise?: string | undefined;
  /** For the server to join. */
  token?: string | undefined;
  ca?: string | undefined;
  keepFree: number;
  log: LogFormat;
}

/** A member, as `status` shows it. */
export interface MemberStatus {
  node: string;
  /** `host:port`, as clients are told. */
  address: string;
  /** Clients are sent to live ones only; one that is joining does not have all of the tree yet. */
  state: "live" | "joining" | "gone";
  revision: number;
  /** Revisions behind. */
  lag: number;
  problem?: string | undefined;
  /** It is an equal of this one rather than below it: whom it is sent it serves itself. */
  isEqual?: boolean;
}

/** What the keeper has told everyone last. */
export interface ClusterState {
  role: "alone" | "master" | "replica" | "member";
  node: string;
  /** `host:port` of the server that was joined, or the ledger outside. */
  master?: string | undefined;
  revision: number;
  /** What keeps this member behind. */
  problem?: string | undefined;
  /** Why nothing can be changed here, for now. */
  refusal?: string | undefined;
  /** The members that have joined this one, and its equals; clients are sent to the live ones in turn. */
  replicas: MemberStatus[];
  /** Among equals: this one is live, too, and takes its turn. */
  takesTurn?: boolean | undefined;
  /** Tokens by which members know each other; like one with the access `replica`, of the whole root. */
  secrets: string[];
  /** The nodes that are heard of, in all of the cluster; undefined where that is not known. */
  nodes?: string[] | undefined;
  /** Where to ask for what a member has made and is not here yet: `host:port` by the member's node; "" for all others. */
  holders: { [node: string]: string };
}

/** From a worker to the keeper; an `id` is one of the worker's own. */
export type ToKeeper =
  /** Clients have changed these paths; answered when the ledger knows, and every live member. */
  | { kind: "announce"; id: number; paths: string[] }
  /** A server that may do so begins a link with that message, goes on, or has ended it. */
  | { kind: "linked"; id: number; peer: string; message: object }
  | { kind: "said"; id: number; message: object }
  | { kind: "unlinked"; id: number };

/** From the keeper to one worker. */
export type ToWorker =
  /** `refusal`: why it is not known to all, and will not be soon. */
  | { kind: "announced"; id: number; refusal?: string | undefined }
  /** JSON already: between processes an object costs many times what a text does, and members are told the same. */
  | { kind: "say"; id: number; text: string }
  /** Ends a link, with what is wrong. */
  | { kind: "unlink"; id: number; code: ErrorCode; text: string };

/** From the keeper to the supervisor: `worker` is a worker's number, 0 stands for everyone. */
export type FromKeeper = { worker: number; message: ToWorker } | { worker: 0; cluster: ClusterState };
/** And back. A worker that has ended has ended its links. */
export type ForKeeper = { worker: number; message: ToKeeper } | { worker: number; ended: true };

/** From a worker to the supervisor: who is the next to be sent a client; what is for the keeper. */
export type FromWorker = { kind: "next"; id: number } | { kind: "keeper"; message: ToKeeper };
/** And back. */
export type ForWorker =
  | { kind: "next"; id: number; address?: string | undefined; isEqual?: boolean | undefined }
  | { kind: "cluster"; cluster: ClusterState }
  | { kind: "keeper"; message: ToWorker }
  /** The keeper has ended: the next one knows of no link and no announcement. */
  | { kind: "forgotten" };

export const FOLDER_STORE = "folder";

/** What a server's files are kept in: servers of one cluster have the same bucket, or each a folder of its own. */
export function storeOf(root: string): string {
  return root.startsWith("s3://") ? root.replace(/\/+$/, "") : FOLDER_STORE;
}

/** Where to connect. */
export interface Address {
  host: string;
  port: number;
}

// ---------------------------------------------------------------------------------------------------- supervisor

/** How long to wait before a process is started again. */
export class Restarts {
  #young = 0;

  /** Milliseconds, after one that lived so long. */
  delayAfter(livedMs: number): number {
    this.#young = livedMs < YOUNG_MS ? this.#young + 1 : 0;
    return this.#young > 1 ? Math.min(LAST_RESTART_MS, FIRST_RESTART_MS * 2 ** this.#young) : 0;
  }
}

/** Sends clients to the live members in turn. */
export class Rotation {
  #turn = 0;

  /** Undefined where it is this server's turn, or nobody else is there. */
  next({ replicas, takesTurn = false }: Pick<ClusterState, "replicas" | "takesTurn">): MemberStatus | undefined {
    const live = replicas.filter(isLive);
    const turns = live.length + Number(takesTurn);
    return turns === 0 ? undefined : live[this.#turn++ % turns];
  }
}

function isLive({ state }: MemberStatus): boolean {
  return state === "live";
}

/** The supervisor's side. Nothing that becomes of the keeper ends the server. */
export class KeeperHost {
  /** What workers are to know from their start. */
  cluster: ClusterState | undefined;
  readonly #script: string;
  readonly #settings: () => KeeperSettings;
  readonly #tell: (worker: number, message: ForWorker) => void;
  readonly #rotation = new Rotation();
  readonly #restarts = new Restarts();
  #child: Subprocess | undefined;
  #isReady = false;
  #isWanted = false;
  #isStopping = false;
  /** In order, until it can be told. */
  #waiting: ForKeeper[] = [];

  /** `script` is run with REPRISE_KEEPER; `tell` tells a worker, or all where it is 0. */
  constructor(script: string, settings: () => KeeperSettings, tell: (worker: number, message: ForWorker) => void) {
    this.#script = script;
    this.#settings = settings;
    this.#tell = tell;
  }

  /** Starts the keeper, if there is none. */
  start(): void {
    if (this.#isWanted || this.#isStopping) return;
    this.#isWanted = true;
    this.#spawn();
  }

  onWorker(worker: number, message: FromWorker): void {
    if (message.kind === "next") {
      const { address, isEqual } = (this.cluster && this.#rotation.next(this.cluster)) ?? {};
      this.#tell(worker, { kind: "next", id: message.id, address, isEqual });
      return;
    }
    // The first server that joins; or a worker was there before the keeper.
    if (message.message.kind === "linked" || message.message.kind === "announce") this.start();
    this.#pass({ worker, message: message.message });
  }

  workerEnded(worker: number): void {
    this.#pass({ worker, ended: true });
  }

  /** SIGTERM. It goes on for what the workers still have to end. */
  drain(): void {
    this.#isStopping = true;
    if (this.#child) this.#send("drain");
  }

  /** Ends it, within `ms`. */
  async stop(ms: number): Promise<void> {
    this.#isStopping = true;
    const child = this.#child;
    if (!child) return;
    this.#send("stop");
    await Promise.race([child.exited, Bun.sleep(ms)]);
    this.kill();
  }

  kill(): void {
    this.#isStopping = true;
    this.#child?.kill("SIGKILL");
  }

  #spawn(): void {
    const startedAt = performance.now();
    const child = Bun.spawn({
      cmd: [process.execPath, this.#script],
      env: { ...COMPILING, ...process.env, NOTIFY_SOCKET: undefined, REPRISE_KEEPER: JSON.stringify(this.#settings()) },
      stdio: ["ignore", "inherit", "inherit"],
      ipc: (message: "ready" | FromKeeper, child) => {
        if (child === this.#child) this.#onKeeper(message);
      },
      onExit: () => void this.#onDeath(performance.now() - startedAt),
    });
    this.#child = child;
  }

  #onKeeper(message: "ready" | FromKeeper): void {
    if (message === "ready") {
      this.#isReady = true;
      for (const waiting of this.#waiting.splice(0)) this.#send(waiting);
    } else if ("cluster" in message) {
      this.cluster = message.cluster;
      this.#tell(0, { kind: "cluster", cluster: message.cluster });
    } else this.#tell(message.worker, { kind: "keeper", message: message.message });
  }

  async #onDeath(livedMs: number): Promise<void> {
    this.#child = undefined;
    this.#isReady = false;
    if (this.#isStopping) return;
    log({ log: this.#settings().log, worker: 0 }, { event: "keeper", status: "restarted" });
    // The workers say again what is still to be said.
    this.#waiting = [];
    this.#tell(0, { kind: "forgotten" });
    const ms = this.#restarts.delayAfter(livedMs);
    if (ms > 0) await Bun.sleep(ms);
    if (!this.#isStopping) this.#spawn();
  }

  #pass(message: ForKeeper): void {
    if (!this.#isWanted) return;
    if (this.#isReady) this.#send(message);
    else this.#waiting.push(message);
  }

  /** A keeper that can't be told any more is ended without. */
  #send(message: ForKeeper | "drain" | "stop"): void {
    try {
      this.#child?.send(message);
    } catch {
      this.#child?.kill("SIGKILL");
    }
  }
}

// ---------------------------------------------------------------------------------------------------- worker

interface Announcement {
  paths: string[];
  resolve: () => void;
  reject: (error: RepriseError) => void;
}

/** A worker's side: what it knows of the cluster, and its way to the keeper. */
export class Hub {
  readonly versions: Versions;
  /** Those by which members know each other. */
  members = new Tokens([]);
  #cluster: ClusterState | undefined;
  readonly #send: (message: FromWorker) => void;
  /** Until the keeper has said what is: whether there will be one. */
  readonly #expected: boolean;
  /** The members have each their own. */
  readonly #isReplicated: boolean;
  /** Another worker of the same number had other ids. */
  #last = Math.floor(Math.random() * 2 ** 40);
  readonly #nexts = new Map<number, (next: Extract<ForWorker, { kind: "next" }>) => void>();
  readonly #announcements = new Map<number, Announcement>();
  readonly #links = new Map<number, Link>();
  #isStopping = false;

  constructor(
    options: { root: string; clustered: boolean; isReplicated?: boolean; log: LogFormat; worker: number },
    send: (message: FromWorker) => void,
  ) {
    this.#expected = options.clustered;
    this.#isReplicated = options.isReplicated ?? true;
    this.#send = send;
    this.versions = new Versions(
      `${options.root}/${INDEX}`,
      () => this.isClustered,
      (error) => logBug(options, error),
    );
  }

  get cluster(): ClusterState | undefined {
    return this.#cluster;
  }

  /** Whether changes are to be announced, and files known by their content. */
  get isClustered(): boolean {
    return this.#isReplicated && (this.#cluster ? this.#cluster.role !== "alone" : this.#expected);
  }

  onMessage(message: ForWorker): void {
    switch (message.kind) {
      case "next":
        this.#nexts.get(message.id)?.(message);
        this.#nexts.delete(message.id);
        break;
      case "cluster":
        this.#take(message.cluster);
        break;
      case "forgotten":
        this.#onForgotten();
        break;
      case "keeper":
        this.#onKeeper(message.message);
    }
  }

  #take(cluster: ClusterState): void {
    const isSame = Bun.deepEquals(cluster.secrets, this.#cluster?.secrets ?? []);
    if (!isSame) this.members = new Tokens(cluster.secrets.map(memberToken));
    this.#cluster = cluster;
  }

  #onKeeper(message: ToWorker): void {
    switch (message.kind) {
      case "announced":
        this.#onAnnounced(message);
        break;
      case "say":
        this.#links.get(message.id)?.say(message.text);
        break;
      case "unlink":
        this.#links.get(message.id)?.end(new RepriseError(message.code, message.text));
    }
  }

  #onAnnounced({ id, refusal }: Extract<ToWorker, { kind: "announced" }>): void {
    const announcement = this.#announcements.get(id);
    this.#announcements.delete(id);
    if (refusal === undefined) announcement?.resolve();
    else announcement?.reject(new RepriseError("busy", refusal));
  }

  #onForgotten(): void {
    this.versions.reopen();
    for (const link of this.#links.values())
      link.end(new RepriseError("busy", "the server lost what it knew of its links"));
    for (const [id, { paths }] of this.#announcements) this.#tellKeeper({ kind: "announce", id, paths });
  }

  #tellKeeper(message: ToKeeper): void {
    this.#send({ kind: "keeper", message });
  }

  /** The grace is over: nobody waits any longer for what was announced. */
  stop(): void {
    this.#isStopping = true;
    for (const { reject } of this.#announcements.values()) reject(new RepriseError("shutting_down"));
    this.#announcements.clear();
  }

  // ------------------------------------------------------------------------------------------------ for sessions

  /** [redirect] Whom the next client is sent to, and whether to be answered there; undefined where this server answers itself. */
  async next(): Promise<(Address & { isEqual: boolean }) | undefined> {
    if (!this.#cluster?.replicas.some(isLive)) return undefined;
    const { promise, resolve } = Promise.withResolvers<Extract<ForWorker, { kind: "next" }>>();
    const id = ++this.#last;
    this.#nexts.set(id, resolve);
    this.#send({ kind: "next", id });
    const { address = "", isEqual = false } = await promise;
    const found = addressOf(address);
    return found && { ...found, isEqual };
  }

  /** Resolves when the ledger knows of these changes, and every live member. Throws `shutting_down`, `busy`. */
  announce(paths: string[]): Promise<void> {
    if (!this.isClustered || paths.length === 0) return Promise.resolve();
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    if (this.#isStopping) reject(new RepriseError("shutting_down"));
    else {
      const id = ++this.#last;
      this.#announcements.set(id, { paths, resolve, reject });
      this.#tellKeeper({ kind: "announce", id, paths });
    }
    return promise;
  }

  /**
   * Resolves when what counts of these paths is here, for a change to be made on it, or when that does not come because
   * whoever made it has gone. Throws `busy`, `shutting_down`.
   */
  async caughtUp(paths: string[]): Promise<void> {
    if (!this.isClustered) return;
    const end = performance.now() + CATCH_UP_MS;
    for (const path of withParents(paths)) {
      for (let awaited = this.#awaited(path, paths); awaited.length > 0; awaited = this.#awaited(path, paths)) {
        if (this.#isStopping) throw new RepriseError("shutting_down");
        const isLate = performance.now() > end;
        if (isLate && awaited.every((target) => this.#isAway(target))) break;
        if (isLate)
          throw new RepriseError("busy", `what others have made of ${quote(path)} is still on its way to this server`);
        await Bun.sleep(CATCH_UP_POLL_MS);
      }
    }
  }

  #awaited(path: string, paths: string[]): Record[] {
    const target = this.targetOf(path);
    return [...(target ? [target] : []), ...(paths.includes(path) ? this.targetsBelow(path).values() : [])];
  }

  /** Whether nobody hears of who has made it. The master may have its content, but then it would have come by now. */
  #isAway({ origin }: Record): boolean {
    return this.#cluster?.nodes !== undefined && !this.#cluster.nodes.includes(origin);
  }

  /** [link] Begins one; `unlink` is to follow. */
  link(connection: Connection, message: object): Link {
    const id = ++this.#last;
    const link = new Link(id, connection, (said) => this.#tellKeeper({ kind: "said", id, message: said }));
    this.#links.set(id, link);
    this.#tellKeeper({ kind: "linked", id, peer: connection.peer, message });
    return link;
  }

  unlink({ id }: Link): void {
    this.#links.delete(id);
    this.#tellKeeper({ kind: "unlinked", id });
  }

  /**
   * [redirect] Where the version of a path is that counts, or that it is "gone"; undefined where what is here is to be
   * served: nothing else is known, it cannot be had, or it is what `etag` asks for.
   */
  placeOf(path: string, etag = ""): Address | "gone" | undefined {
    const known = this.versions.get(path);
    if (!known?.target) return undefined;
    if (etag !== "" && known.digest !== "" && etag === etagFor(known.digest)) return undefined;
    return this.#placeOf(known.target);
  }

  /** What is to be at a path, if it is to be told of: see `placeOf`. */
  targetOf(path: string): Record | undefined {
    const target = this.versions.get(path)?.target;
    return target && this.#placeOf(target) !== undefined ? target : undefined;
  }

  #placeOf(target: Record): Address | "gone" | undefined {
    const { node, holders } = this.#cluster ?? { node: "", holders: {} as ClusterState["holders"] };
    if (target.origin === node) return undefined;
    if (target.kind === "gone") return "gone";
    const holder = holders[target.origin] ?? holders[""];
    return holder === undefined ? undefined : addressOf(holder);
  }

  /** What a list of a folder has to show in place of what is there, by the path in it. */
  targetsBelow(folder: string): Map<string, Record> {
    const targets = this.versions.targetsBelow(folder).filter((target) => this.#placeOf(target) !== undefined);
    const start = folder === "" ? 0 : folder.length + 1;
    return new Map(targets.map((target) => [target.path.slice(start), target]));
  }
}

/** Each with the folders that it is in. */
function withParents(paths: string[]): Set<string> {
  const all = new Set(paths);
  for (const path of paths)
    for (let at = path.indexOf("/"); at > 0; at = path.indexOf("/", at + 1)) all.add(path.slice(0, at));
  return all;
}

/** Of `host:port`, with an IPv6 address in brackets. */
export function addressOf(text: string): Address | undefined {
  const match = /^(?:\[([0-9a-f:.%]+)\]|([^\s:/[\]]+)):(\d{1,5})$/i.exec(text);
  const port = Number(match?.[3]);
  if (!match || port < 1 || port > 65_535) return undefined;
  return { host: (match[1] ?? match[2])!, port };
}

function memberToken(secret: string) {
  const sha256 = createHash("sha256").update(secret).digest("hex");
  // No token of a file can have that name.
  return { name: "(member)", access: "replica" as const, folder: "", sha256, created: "" };
}

// ---------------------------------------------------------------------------------------------------- link

/** One connection between a peer, which is a server, and the keeper: LINK frames both ways, until either side ends it. */
export class Link {
  readonly id: number;
  readonly #connection: Connection;
  readonly #hear: (message: object) => void;
  #frames: Uint8Array[] = [];
  #unsentBytes = 0;
  #isSending = false;
  /** Why it was ended from here; the peer is told so behind all else. */
  #error: RepriseError | undefined;

  constructor(id: number, connection: Connection, hear: (message: object) => void) {
    this.id = id;
    this.#connection = connection;
    this.#hear = hear;
  }

  /** Returns what ended it in order: undefined for the peer. Throws what is wrong with the peer or the connection. */
  async carry(next: () => Promise<Frame | undefined>): Promise<RepriseError | undefined> {
    try {
      for (let frame = await next(); frame; frame = await next()) {
        const request = decodeRequest(frame);
        if (request.action !== "link")
          throw new RepriseError("bad_frame", "not the reprise protocol: a request in the middle of a link");
        if (!this.#error) this.#hear(request.message);
      }
      return undefined;
    } catch (error) {
      if (error === this.#error) return this.#error;
      throw error;
    }
  }

  /** A peer that does not take what it is told is not waited for without end, nor is all kept for it. */
  say(text: string): void {
    if (!this.#error) this.#queue(encodeLinkText(text));
  }

  end(error: RepriseError): void {
    if (this.#error) return;
    this.#error = error;
    this.#queue(encodeError(error));
  }

  #queue(frame: Uint8Array): void {
    this.#frames.push(frame);
    this.#unsentBytes += frame.length;
    if (this.#unsentBytes > MAX_UNSENT_BYTES)
      this.#connection.fail(new RepriseError("timeout", "too much that is not read"));
    else if (!this.#isSending) this.#sendAll().catch((error) => this.#connection.fail(error));
  }

  async #sendAll(): Promise<void> {
    this.#isSending = true;
    while (this.#frames.length > 0) {
      const frames = this.#frames.splice(0);
      for (const frame of frames) this.#connection.collect(frame);
      await this.#connection.flush();
      for (const { length } of frames) this.#unsentBytes -= length;
    }
    this.#isSending = false;
    // Whoever waits for the peer is to learn of it.
    if (this.#error) this.#connection.fail(this.#error);
  }
}

// ---------------------------------------------------------------------------------------------------- versions

function etagFor(digest: string): string {
  return digest.slice(0, ETAG_DIGITS);
}

/**
 * What the index says, for as long as the server is in a cluster. A file's version is named by its content there, so that a
 * download can go on with another member. An index that cannot be read costs that, and nothing else.
 */
export class Versions implements Etags {
  readonly #path: string;
  readonly #isClustered: () => boolean;
  readonly #onFailure: (error: unknown) => void;
  #reader: IndexReader | undefined;
  readonly #reopenMs: number;
  #isFailing = false;
  #tryAgainAt = 0;
  /** Whether something newer than what `of` was last asked for is elsewhere: saves small files a second look. */
  isBehind = false;

  constructor(
    path: string,
    isClustered: () => boolean,
    onFailure: (error: unknown) => void,
    reopenMs: number = REOPEN_MS,
  ) {
    this.#reopenMs = reopenMs;
    this.#path = path;
    this.#isClustered = isClustered;
    this.#onFailure = onFailure;
  }

  of(path: string, etag: string): string {
    const known = this.get(path);
    this.isBehind = known?.target !== undefined;
    return known && known.digest !== "" && known.etag === etag ? etagFor(known.digest) : etag;
  }

  get(path: string): Known | undefined {
    return this.#read((reader) => reader.get(path));
  }

  targetsBelow(folder: string): Record[] {
    return this.#read((reader) => reader.targetsBelow(folder)) ?? [];
  }

  /** The next look is into the file that then has the name. */
  reopen(): void {
    const reader = this.#reader;
    this.#reader = undefined;
    try {
      reader?.close();
    } catch {
      // Nothing is read from it any more.
    }
  }

  #read<T>(read: (reader: IndexReader) => T): T | undefined {
    if (!this.#isClustered()) return undefined;
    if (this.#isFailing && performance.now() < this.#tryAgainAt) return undefined;
    try {
      this.#reader ??= openIndex(this.#path);
      const found = this.#reader && read(this.#reader);
      this.#isFailing = false;
      return found;
    } catch (error) {
      // Said once, until it could be read again.
      if (!this.#isFailing) this.#onFailure(error);
      this.#isFailing = true;
      this.#tryAgainAt = performance.now() + this.#reopenMs;
      this.reopen();
      return undefined;
    }
  }
}

/** Loaded where there is a cluster: no other worker needs SQLite. */
function openIndex(path: string): IndexReader | undefined {
  return (require("./index.ts") as typeof import("./index.ts")).IndexReader.open(path);
}

/** The entries of a folder, with what is to be there in place of what is; uses `targets` up. */
export async function* withTargets(
  entries: AsyncIterable<Entry[]>,
  targets: Map<string, Record>,
  recursive: boolean,
): AsyncGenerator<Entry[]> {
  for await (const found of entries) {
    const shown = found.map((entry) => entryIn(targets, entry)).filter((entry) => entry !== undefined);
    if (shown.length > 0) yield shown;
  }
  // In order, so that a folder comes before what is in it.
  const paths = [...targets.keys()].filter((path) => isListed(path, recursive)).sort();
  const added = paths.map((path) => entryOf(targets.get(path)!, path)).filter((entry) => entry !== undefined);
  if (added.length > 0) yield added;
}

/** A folder that is to be here, and perhaps is not yet. */
export async function* orNothing(entries: AsyncIterable<Entry[]>): AsyncGenerator<Entry[]> {
  try {
    yield* entries;
  } catch (error) {
    const isMissing = error instanceof RepriseError && ["not_found", "not_a_folder"].includes(error.code);
    if (!isMissing) throw error;
  }
}

/** An entry as it is to be shown. */
function entryIn(targets: Map<string, Record>, entry: Entry): Entry | undefined {
  const target = targets.get(entry.path);
  if (!target) return entry;
  targets.delete(entry.path);
  return target.kind === "folder" && entry.kind === "folder" ? entry : entryOf(target, entry.path);
}

function entryOf({ kind, size, mtime }: Record, path: string): Entry | undefined {
  return kind === "gone" ? undefined : { kind, size, mtime, path };
}

function isListed(path: string, recursive: boolean): boolean {
  const segments = path.split("/");
  return (recursive || segments.length === 1) && !segments.some(isHidden);
}
