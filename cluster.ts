/**
 * Stage 3: the keeper, the one process of a server that follows its cluster (keeper.ts). The workers serve, the keeper keeps
 * the tree.
 *
 * Every server is the master of those that have joined it. The first master of all has the ledger; a member sends what
 * changes in its tree up to its master, as a proposal, and gets the ledger's records down from it, over one link. It hands
 * both on to members of its own, which are the concern of members.ts. What comes of a record is decided by `step` of
 * replica.ts, alike at the master; looking at the tree is done in watch.ts, changing it in place.ts.
 *
 * A change is acknowledged when the ledger has it on disk and every live member knows of it: whichever member a client asks
 * next, it gets that version, or is sent to who has it.
 */
import { randomBytes } from "node:crypto";
import { existsSync, rmSync } from "node:fs";
import { openChanges } from "./changes.ts";
import { say } from "./command.ts";
import { formatAddress, isEverywhere, isLoopback } from "./connection.ts";
import { parseCluster } from "./etcd.ts";
import {
  type ClusterState,
  FOLDER_STORE,
  type ForKeeper,
  type FromKeeper,
  type KeeperSettings,
  storeOf,
} from "./hub.ts";
import { INDEX_FILE, Index } from "./index.ts";
import {
  type Decision,
  EmbeddedLedger,
  type Log,
  type Proposal,
  type Record,
  STRETCH_RECORDS,
  type Stretch,
} from "./ledger.ts";
import { type Above, call, type FromMaster, LEASE_MS, LINK_VERSION, type Proposed, UNKNOWN, Up } from "./link.ts";
import { log } from "./log.ts";
import { circle, Members, statusOf } from "./members.ts";
import type { Address } from "./peer.ts";
import { Placer } from "./place.ts";
import { ERRORS, RepriseError } from "./protocol.ts";
import { Quorum } from "./quorum.ts";
import { parseServers, Remote } from "./remote.ts";
import { type Effect, type Event, isDirty, type State, step } from "./replica.ts";
import { openFolder } from "./storage.ts";
import { type Finding, Observer } from "./watch.ts";

const LEDGER_FILE = "ledger.sqlite";
const BEAT_MS = 1_000;
const PUBLISH_MS = 100;
const NO_ROOM = "no room on the disk for what it knows of the cluster; tried again until there is";
const PRUNE_MS = 60_000;
/** Characters of a problem that a master is told. */
const MAX_PROBLEM = 500;

/** What a server without files of its own, or whose files are kept elsewhere, does about them: nothing. */
type Watching = Pick<Observer, "start" | "examine" | "isStill" | "close">;
type Placing = Pick<Placer, "want" | "aside" | "applied" | "hurry" | "close" | "problem">;
const NOTHING: Watching & Placing = {
  start: async () => {},
  examine: async () => {},
  isStill: () => true,
  want() {},
  aside: async () => {},
  applied: async () => {},
  hurry() {},
  close() {},
  problem: undefined,
};

/** It shares who its members are, and no files: they are on the same bucket, or it has none. */
export function isStateless({ root, redirectOnly }: KeeperSettings): boolean {
  return redirectOnly === true || storeOf(root) !== FOLDER_STORE;
}

export class Keeper {
  readonly #settings: KeeperSettings;
  readonly #send: (message: FromKeeper) => void;
  readonly #isStateless: boolean;
  readonly #index: Index;
  readonly #state: State;
  readonly #observer: Watching;
  readonly #placer: Placing;
  readonly #node: string;
  /** By which members know each other; the master's counts. */
  #secret: string;
  readonly #callSecret = randomBytes(32).toString("base64url");
  /** At the first master of all. */
  #ledger: EmbeddedLedger | undefined;
  #up: Above | undefined;
  /** The same, among equals. */
  #quorum: Quorum | undefined;
  /** Those that have joined this one. */
  readonly #members: Members;
  /** Proposed here or below and not yet given to the ledger or up. */
  #proposed: Proposed[] = [];
  #isProposing = false;
  /** Own proposals without an answer. */
  readonly #undecided = new Map<string, number>();
  readonly #announced: Announced[] = [];
  #publishTimer: Timer | undefined;
  #isStarted = false;
  /** All that the tree had at the start is in the ledger, or on its way there. */
  #hasLooked = false;

  /** Throws where the root cannot be written. */
  constructor(settings: KeeperSettings, send: (message: FromKeeper) => void) {
    this.#settings = settings;
    this.#send = send;
    const { root: path, keepFree } = settings;
    this.#isStateless = isStateless(settings);
    this.#index = new Index(this.#isStateless ? ":memory:" : `${path}/.reprise/${INDEX_FILE}`);
    this.#node = this.#index.node;
    this.#secret = String(
      this.#index.fact("secret") ?? this.#index.setFact("secret", randomBytes(32).toString("base64url")),
    );
    const cursor = Number(this.#index.fact("cursor") ?? 0);
    this.#state = { node: this.#node, entries: this.#index, cursor, online: false, snapshot: undefined };
    [this.#observer, this.#placer] = this.#isStateless ? [NOTHING, NOTHING] : this.#openTree(path, keepFree);
    this.#members = this.#openMembers();
  }

  #openTree(path: string, keepFree: number): [Observer, Placer] {
    const changes = openChanges(path, { keepFree });
    const root = openFolder(path);
    const observer = new Observer(root, this.#index, {
      take: (found) => this.#takeFound(found),
      onError: (error) => this.#complain("look at the tree", error),
    });
    const placer = new Placer({
      root,
      changes,
      index: this.#index,
      state: this.#state,
      holdersOf: (record) => this.#holdersOf(record),
      connectTo: (address) => this.#connectTo(address),
      take: (events) => this.#take(events),
      isEveryoneHere: () => this.#isEveryoneHere,
      examine: (paths) => void this.#observer.examine(paths),
    });
    return [observer, placer];
  }

  start(): void {
    setInterval(() => this.#beat(), BEAT_MS);
    setInterval(() => this.#prune(), PRUNE_MS);
    const { join, cluster } = this.#settings;
    if (join !== undefined) this.#joinMaster(join);
    else if (cluster !== undefined) this.#joinEquals(cluster);
    else if (!this.#isStateless && existsSync(this.#ledgerPath)) this.#becomeMaster();
    // Members of the keeper before this one are not waited for: clients are not to be sent there any more.
    this.#publish();
  }

  /** The server takes no more clients. */
  drain(): void {
    this.#quorum?.leave();
  }

  close(): void {
    this.#up?.close();
    this.#placer.close();
    this.#observer.close();
    this.#members.note();
    this.#ledger?.close();
    this.#index.close();
  }

  onMessage(message: ForKeeper): void {
    const { worker } = message;
    if ("ended" in message) this.#members.workerEnded(worker);
    else if (message.message.kind !== "announce") this.#members.onWorker(worker, message.message);
    else {
      const { id, paths } = message.message;
      const done = (refusal?: string) => this.#send({ worker, message: { kind: "announced", id, refusal } });
      void this.#announce(paths).then(done);
    }
  }

  /** For `status`, which shows it until the next keeper has something else to say. */
  tellNoRoom(): void {
    log(this.#logSettings, { event: "keeper", status: "no_room" });
    this.#send({ worker: 0, cluster: { ...this.#cluster, problem: NO_ROOM } });
  }

  // ------------------------------------------------------------------------------------------------ the tree

  get #ledgerPath(): string {
    return this.#isStateless ? ":memory:" : `${this.#settings.root}/.reprise/${LEDGER_FILE}`;
  }

  /**
   * What is seen of the tree may be old when it comes here: the keeper itself has changed it meanwhile. What it is changing
   * now, and has not yet been told of, would be taken for somebody else's change.
   */
  async #takeFound(found: Finding[]): Promise<void> {
    await this.#placer.applied(found.map(({ path }) => path));
    const stale: string[] = [];
    const events: Event[] = [];
    for (const finding of found) {
      if (this.#observer.isStill(finding)) events.push({ kind: "seen", ...finding });
      else stale.push(finding.path);
    }
    this.#take(events);
    if (stale.length > 0) void this.#observer.examine(stale);
  }

  /** All of them, or none, become part of the index; what is to be done about them is begun afterwards. */
  #take(events: Event[]): void {
    if (events.length === 0) return;
    this.#perform(this.#stepAll(events));
    this.#settleAnnounced();
    this.#publishSoon();
  }

  /** Ends the keeper where the index cannot be changed, whoever may take that for a problem of their own. */
  #stepAll(events: Event[]): Effect[] {
    const state = this.#state;
    try {
      return this.#index.transaction(() => {
        const cursor = state.cursor;
        const effects = events.flatMap((event) => step(state, event));
        if (state.cursor !== cursor) this.#index.setFact("cursor", state.cursor);
        return effects;
      });
    } catch (error) {
      // What is in memory is not what is on disk any more.
      queueMicrotask(() => {
        throw error;
      });
      throw error;
    }
  }

  #perform(effects: Effect[]): void {
    const proposals: Proposal[] = [];
    for (const effect of effects) {
      if (effect.kind === "propose") proposals.push({ path: effect.path, base: effect.base, version: effect.version });
      else if (effect.kind === "place") this.#placer.want(effect.record, effect.etag);
      else if (effect.kind === "aside") void this.#placer.aside(effect.path, effect.etag, effect.to);
      else this.#readOn(effect.after);
    }
    if (proposals.length > 0) this.#proposeOwn(proposals);
  }

  #proposeOwn(proposals: Proposal[]): void {
    const undecided = this.#undecided;
    for (const { path } of proposals) undecided.set(path, (undecided.get(path) ?? 0) + 1);
    this.#propose({
      origin: this.#node,
      proposals,
      answer: (decisions) => {
        for (const { path } of proposals) countDown(undecided, path);
        this.#take(decisions.map((decision, at) => decided(proposals[at]!, decision)));
      },
    });
  }

  #readOn(after: number): void {
    if (this.#up) this.#up.read(after);
    else if (this.#ledger) this.#follow();
  }

  // ------------------------------------------------------------------------------------------------ clients that wait

  /** What keeps a client waiting: a change of its own, until the ledger and all live members know. Returns why not. */
  async #announce(paths: string[]): Promise<string | undefined> {
    await this.#observer.examine(paths);
    const open = new Set<string>();
    for (const path of paths) for (const entry of this.#around(path)) if (this.#isUnknown(entry)) open.add(entry);
    if (open.size === 0) return undefined;
    if (!this.#state.online) return this.#refusal;
    return new Promise((resolve) => this.#announced.push({ open, resolve }));
  }

  /**
   * Why nothing can be changed here: among equals that cannot ask the ledger, each would go on by itself, and readers would
   * get one version here and another there. A member of a master brings in later what it takes meanwhile.
   */
  get #refusal(): string | undefined {
    if (!this.#quorum || this.#state.online) return undefined;
    return `no change can be made now: ${this.#quorum.problem}`;
  }

  /** A path, the folders that it is in, and all that is in it. */
  *#around(path: string): Generator<string> {
    for (let at = path.indexOf("/"); at > 0; at = path.indexOf("/", at + 1)) yield path.slice(0, at);
    yield path;
    for (const entry of this.#index.below(path)) yield entry.path;
  }

  #isUnknown(path: string): boolean {
    if (this.#undecided.has(path)) return true;
    const entry = this.#index.get(path);
    return entry !== undefined && !entry.target && isDirty(entry);
  }

  #settleAnnounced(): void {
    for (let at = this.#announced.length - 1; at >= 0; at--) {
      const { open, resolve } = this.#announced[at]!;
      for (const path of open) {
        if (this.#isUnknown(path)) break;
        open.delete(path);
      }
      if (open.size > 0 && this.#state.online) continue;
      this.#announced.splice(at, 1);
      resolve(open.size > 0 ? this.#refusal : undefined);
    }
  }

  // ------------------------------------------------------------------------------------------------ the ledger

  #becomeMaster(): void {
    if (this.#ledger || this.#up) return;
    const ledger = new EmbeddedLedger(this.#ledgerPath);
    this.#ledger = ledger;
    ledger.watch(() => this.#follow());
    this.#useLedger(ledger.id);
    this.#members.remember(ledger);
    this.#take([{ kind: "online" }]);
    void this.#look();
    log(this.#logSettings, { event: "cluster", status: "master" });
  }

  #useLedger(id: string): void {
    if (this.#index.fact("ledger") === id) return;
    this.#index.transaction(() => {
      this.#index.forgetLedger();
      this.#index.setFact("ledger", id);
      this.#index.setFact("cursor", 0);
      this.#index.setFact("pruned", 0);
    });
    this.#state.cursor = 0;
  }

  /** The first time, and from then on by itself. */
  async #look(): Promise<void> {
    if (this.#isStarted) return;
    this.#isStarted = true;
    await this.#observer.start(this.#settings.root);
    // What was found is given to the ledger at the end of this turn.
    await new Promise((resolve) => setImmediate(resolve));
    this.#hasLooked = true;
    this.#members.retarget(this.#log.revision);
  }

  #propose(proposed: Proposed): void {
    this.#proposed.push(proposed);
    if (this.#isProposing) return;
    this.#isProposing = true;
    // What comes together is decided together, and synced once.
    setImmediate(() => {
      this.#isProposing = false;
      const all = this.#proposed;
      this.#proposed = [];
      if (this.#ledger) this.#append(this.#ledger, all);
      else for (const one of all) this.#up?.propose(one);
    });
  }

  #append(ledger: EmbeddedLedger, all: Proposed[]): void {
    const decided = ledger.together(() =>
      all.map(({ origin, proposals }) => ledger.append(origin, proposals).decisions),
    );
    const { revision } = ledger;
    void this.#members.knownToAll(revision).then(() => {
      for (const [at, { answer }] of all.entries()) answer(decided[at]!);
    });
  }

  /** At the master: takes in what the ledger has, and tells the members. */
  #follow(): void {
    const ledger = this.#ledger!;
    let at = this.#state.cursor;
    let isWithinSnapshot = false;
    while (this.#state.cursor < ledger.revision) {
      // The cursor stays where it is until the whole of a snapshot is there.
      const stretch = ledger.read(at, STRETCH_RECORDS, isWithinSnapshot);
      at = stretch.revision;
      isWithinSnapshot = stretch.snapshot === "part";
      this.#take([{ kind: "stretch", ...stretch }]);
    }
    this.#members.pump();
  }

  /** What members below are told from. */
  get #log(): Log {
    if (this.#ledger) return this.#ledger;
    const [index, state] = [this.#index, this.#state];
    return {
      revision: state.cursor,
      pruned: Number(index.fact("pruned") ?? 0),
      records: (after, limit) => index.records(after, limit),
    };
  }

  #prune(): void {
    void this.#quorum?.prune();
    if (!this.#ledger) return;
    this.#members.note();
    this.#ledger.prune(this.#revision);
    this.#index.prune(this.#ledger.pruned);
  }

  /** The tree has all of the log up to here. */
  get #revision(): number {
    const oldest = this.#index.oldestTarget;
    return oldest === undefined ? this.#state.cursor : Math.min(oldest - 1, this.#state.cursor);
  }

  // ------------------------------------------------------------------------------------------------ up

  #joinMaster(server: string): void {
    const [address] = parseServers(server);
    const { token, ca } = this.#settings;
    const { host, port } = this.#told;
    const { node, secret } = { node: this.#node, secret: this.#callSecret };
    const up = new Up({
      address: { ...address!, tls: address!.tls || this.#settings.tls },
      token,
      ca,
      join: () => ({
        kind: "join",
        version: LINK_VERSION,
        store: storeOf(this.#settings.root),
        node,
        host,
        port,
        secret,
        below: this.#members.waitingNodes,
      }),
      onJoined: (message) => this.#onJoined(message),
      onMessage: (message) => this.#onMaster(message),
      onLost: (error) => this.#onLost(error),
    });
    this.#join(up);
  }

  #joinEquals(cluster: string): void {
    const { root, redirectOnly = false, tls } = this.#settings;
    const quorum = new Quorum({
      cluster: parseCluster(cluster),
      node: this.#node,
      address: formatAddress(this.#told.host, this.#told.port),
      store: redirectOnly ? undefined : storeOf(root),
      isServing: !redirectOnly,
      tls,
      onJoined: (message) => this.#onJoined(message),
      onMessage: (message) => this.#onMaster(message),
      onMembers: () => this.#onMembers(),
      onLost: (error) => this.#onLost(error),
      check: (address, node) => this.#check(address, node),
      newest: () => this.#index.newest,
    });
    this.#quorum = quorum;
    this.#join(quorum);
  }

  #join(above: Above): void {
    this.#up = above;
    say("info", `joining ${above.name}`);
    // The workers are to know the one who calls back.
    this.#publish();
    // Before anything is proposed, what is there is known: the master's own files are not taken for changes.
    void this.#look().then(() => above.run());
  }

  /** Where clients are sent; the host is "" where a master knows better. */
  get #told(): Address {
    const { host, port, advertise } = this.#settings;
    if (advertise !== undefined) return parseServers(advertise)[0]!;
    return { host: isEverywhere(host) ? "" : host, port };
  }

  #onJoined({ ledger, secret }: Extract<FromMaster, { kind: "joined" }>): void {
    this.#useLedger(ledger);
    if (this.#quorum) this.#index.setFact("cluster", this.#quorum.cluster);
    // A log that this server had as a master would be brought back if it were one again.
    if (!this.#isStateless) for (const file of ["", "-wal", "-shm"]) rmSync(this.#ledgerPath + file, { force: true });
    this.#secret = String(this.#index.setFact("secret", secret));
    log(this.#logSettings, { event: "join", peer: this.#up!.name, status: "ok" });
    const who = this.#quorum ? "whose members send" : "which sends";
    say("info", `joined ${this.#up!.name}, ${who} clients here as soon as its files are here`);
    this.#take([{ kind: "online" }]);
    this.#publish();
    this.#sayAlive();
    this.#placer.hurry();
  }

  #onLost(error: RepriseError): void {
    const isNews = this.#state.online || this.#up!.problem !== error.message;
    this.#up!.problem = error.message;
    if (isNews) {
      const { name } = this.#up!;
      log(this.#logSettings, { event: "join", peer: name, status: error.code });
      const isFinal = !ERRORS[error.code].retry;
      const what = isFinal ? `cannot join ${name}` : `no connection to ${this.#quorum ? "" : "the master "}${name}`;
      const why = error.message.startsWith(`${name}: `) ? error.message.slice(name.length + 2) : error.message;
      say("warn", `${what}: ${why}; trying again`);
    }
    this.#take([{ kind: "offline" }]);
    this.#undecided.clear();
    // Those below are to ask again, too.
    this.#members.unlink(new RepriseError("busy", "the master is not there"));
  }

  #onMaster(message: FromMaster): void {
    const up = this.#up!;
    switch (message.kind) {
      case "stretch": {
        const { stretch, pruned } = message;
        if (this.#isStateless) this.#state.cursor = stretch.revision;
        else this.#take([{ kind: "stretch", ...stretch }]);
        up.received = stretch.revision;
        this.#forget(stretch, pruned);
        this.#members.pump();
        this.#sayAlive();
        break;
      }
      case "alive":
        if (message.chain.includes(this.#node)) throw circle();
    }
  }

  /** Deletions that the master has forgotten are no more use here. */
  #forget({ snapshot, revision }: Stretch, pruned: number): void {
    const upTo = snapshot === "complete" ? revision : snapshot ? 0 : Math.min(pruned, this.#state.cursor);
    if (upTo <= Number(this.#index.fact("pruned") ?? 0)) return;
    this.#index.prune(upTo);
    this.#index.setFact("pruned", upTo);
  }

  /** How far this member is, and all below it. */
  #sayAlive(): void {
    const problem = this.#placer.problem?.slice(0, MAX_PROBLEM);
    const { nodes } = this.#members;
    const received = this.#up?.received ?? 0;
    const known = Math.min(this.#state.cursor, this.#members.known);
    this.#up?.say({ kind: "alive", received, known, revision: this.#revision, nodes, problem });
  }

  // ------------------------------------------------------------------------------------------------ down

  #openMembers(): Members {
    return new Members({
      settings: this.#settings,
      node: this.#node,
      log: () => this.#log,
      ledger: () => this.#ledger,
      above: () => this.#up,
      isOnline: () => this.#state.online,
      isWhole: () => this.#state.snapshot === undefined,
      admit: () => this.#admit(),
      call: (address, node, token) => call({ ...this.#addressOf(address), ca: this.#settings.ca, token, node }),
      propose: (proposed) => this.#propose(proposed),
      onLaterLog: (ledger, address) => this.#renewLedger(ledger, address),
      onChange: () => this.#publish(),
      onProgress: (known, hasMore) => this.#onProgress(known, hasMore),
      send: this.#send,
    });
  }

  #admit(): { ledger: string; secret: string; target: number } {
    this.#becomeMaster();
    // What is here and not yet in the ledger is missing there.
    const target = this.#hasLooked ? this.#log.revision : UNKNOWN;
    return { ledger: String(this.#index.fact("ledger")), secret: this.#secret, target };
  }

  /** A member knows more of the log than there is: an older one was put back, of which the end is missing. */
  #renewLedger(ledger: EmbeddedLedger, address: string): void {
    say("warn", `${address} knows a later log than this one, which is now another: all say anew what they have`);
    ledger.renew();
    this.#useLedger(ledger.id);
    this.#members.unlink(new RepriseError("busy", "the log is another now"));
    this.#take([{ kind: "online" }]);
  }

  #onProgress(known: number, hasMore: boolean): void {
    if (hasMore) this.#placer.hurry();
    // Up goes only what is news there.
    if (known <= this.#state.cursor) this.#sayAlive();
    this.#publishSoon();
  }

  /** Once a second. */
  #beat(): void {
    this.#members.expire();
    const chain = [...(this.#up?.chain ?? []), this.#node];
    this.#members.tell({ kind: "alive", revision: this.#log.revision, chain, nodes: this.#nodes });
    this.#up?.beat();
    this.#sayAlive();
    this.#publishSoon();
  }

  // ------------------------------------------------------------------------------------------------ who is where

  /** Clients are sent to equals that answer there; who says so may be anybody. */
  async #check(address: string, node: string): Promise<void> {
    const remote = this.#connectTo(address);
    try {
      const { node: found } = await remote.status();
      if (found !== node) throw new RepriseError("refused", `another server is at ${address}; see --advertise`);
    } finally {
      remote.close();
    }
  }

  /** Some have come, gone, or got further. */
  #onMembers(): void {
    this.#placer.hurry();
    this.#publishSoon();
  }

  #holdersOf({ origin }: Record): string[] {
    const around = [...this.#members.all, ...(this.#quorum?.equals ?? [])];
    const made = around.filter(({ node, nodes }) => node === origin || nodes.includes(origin));
    const others = around.filter((member) => !made.includes(member));
    const up = this.#up && !this.#quorum ? [this.#up.name] : [];
    return [...made.map(({ address }) => address), ...up, ...others.map(({ address }) => address)];
  }

  /** Who is heard of, here or above; undefined where that is not known yet. */
  get #nodes(): string[] | undefined {
    const above = this.#up ? this.#up.nodes : [];
    return above && [...new Set([this.#node, ...above, ...this.#members.nodes])];
  }

  /** Only the first master can know, and equals, who all have the same ledger. */
  get #isEveryoneHere(): boolean {
    if (this.#quorum) return this.#quorum.isEveryoneHere;
    return this.#ledger !== undefined && this.#members.isEveryoneHere;
  }

  #connectTo(address: string): Remote {
    const server = this.#addressOf(address);
    const isSafe = server.tls || isLoopback(server.host) || server.host === "localhost";
    return new Remote({
      servers: [server],
      direct: true,
      token: isSafe ? this.#secret : undefined,
      ca: this.#settings.ca,
      timeoutMs: LEASE_MS,
      retries: 1,
    });
  }

  #addressOf(address: string): Address {
    return { ...parseServers(address)[0]!, tls: this.#settings.tls || this.#up?.tls === true };
  }

  #publishSoon(): void {
    this.#publishTimer ??= setTimeout(() => this.#publish(), PUBLISH_MS);
  }

  #publish(): void {
    clearTimeout(this.#publishTimer);
    this.#publishTimer = undefined;
    this.#send({ worker: 0, cluster: this.#cluster });
    this.#sayAlive();
  }

  get #cluster(): ClusterState {
    const [up, quorum, online] = [this.#up, this.#quorum, this.#state.online];
    const around = [...this.#members.all, ...(quorum?.equals ?? [])];
    const holders = Object.fromEntries(
      around.flatMap(({ node, nodes, address }) => [node, ...nodes].map((node) => [node, address])),
    );
    const above = quorum ? quorum.furthest?.address : up?.name;
    const { revision } = this.#log;
    const equals = quorum?.equals.map((equal) => ({ ...statusOf(equal, equal.state, revision), isEqual: true })) ?? [];
    const gone = quorum?.gone.map((member) => statusOf(member, "gone", revision)) ?? [];
    return {
      role: quorum ? "member" : up ? "replica" : this.#ledger ? "master" : "alone",
      node: this.#node,
      master: up?.name,
      revision: this.#revision,
      problem: up && !online ? up.problem : this.#placer.problem,
      refusal: this.#refusal,
      replicas: [...this.#members.statuses, ...equals, ...gone],
      takesTurn: quorum?.isLive,
      secrets: [this.#secret, this.#callSecret],
      nodes: this.#nodes,
      holders: above === undefined ? holders : { "": above, ...holders },
    };
  }

  #complain(what: string, error: unknown): void {
    say("warn", `cannot ${what}: ${error instanceof Error ? error.message : error}`);
  }

  get #logSettings() {
    return { log: this.#settings.log, worker: 0 };
  }
}

/** Changes of a client that waits. */
interface Announced {
  open: Set<string>;
  resolve: (refusal: string | undefined) => void;
}

function decided({ path, version }: Proposal, decision: Decision): Event {
  if ("revision" in decision) return { kind: "decided", path, version, revision: decision.revision };
  return { kind: "refused", path, version, refusedFor: decision.refusedFor };
}

function countDown(counts: Map<string, number>, key: string): void {
  const count = (counts.get(key) ?? 0) - 1;
  if (count > 0) counts.set(key, count);
  else counts.delete(key);
}
