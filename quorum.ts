/**
 * The way to a ledger that is kept outside of the servers, by etcd: what `Up` of link.ts is to a master. There is none here.
 * All members are equals, each of which knows the others by what they say of themselves in the ledger, under a lease.
 *
 * A change is answered when the ledger has it and every live member knows of it. A member is waited for from the moment at
 * which it says that it is live; clients are sent to it once it knows all that was in the ledger before that, and can be
 * reached where it says that it is.
 */
import { say } from "./command.ts";
import { Etcd, type EtcdCluster, parseCluster } from "./etcd.ts";
import { EtcdLedger, type LiveMember } from "./etcdledger.ts";
import { FOLDER_STORE, type MemberStatus } from "./hub.ts";
import type { Decision, Member } from "./ledger.ts";
import { type Above, type Alive, type FromMaster, keepJoined, type Proposed, Standing, UNKNOWN } from "./link.ts";
import { RepriseError } from "./protocol.ts";

/** An equal that could not be reached is tried again after that. */
const CHECK_RETRY_MS = 2_000;
/** And so is one of which nothing was heard for so long, a beat or two: it has gone, while its lease goes on. */
const SILENT_MS = 2_500;

interface QuorumOptions {
  cluster: EtcdCluster;
  /** What the members have: see `EtcdLedger`; undefined where this one has nothing. */
  store: string | undefined;
  tls: boolean;
  node: string;
  /** What clients are told: `host:port`. */
  address: string;
  /** It takes clients, rather than only sending them on. */
  isServing: boolean;
  onJoined: (message: Extract<FromMaster, { kind: "joined" }>) => void;
  onMessage: (message: FromMaster) => void;
  /** Members have come, gone, or got further. */
  onMembers: () => void;
  onLost: (error: RepriseError) => void;
  /** Throws where that node is not to be reached at an address. */
  check: (address: string, node: string) => Promise<void>;
  /** Of all records, the newest that this member has. */
  newest: () => { path: string; revision: number } | undefined;
}

/** Another member. */
class Equal {
  readonly node: string;
  said: LiveMember;
  /** Where it was left out, its target is what it has to know. */
  readonly standing = new Standing(0);
  /** Why it cannot be reached; undefined where it can. */
  unreached: string | undefined = "not reached yet";
  checkedAt = Number.NEGATIVE_INFINITY;
  heardAt = performance.now();
  /** By which this one was told of it. */
  readonly ledger: EtcdLedger | undefined;

  constructor(node: string, said: LiveMember, ledger: EtcdLedger | undefined) {
    this.node = node;
    this.said = said;
    this.ledger = ledger;
  }

  get address(): string {
    return this.said.address;
  }

  get revision(): number {
    return this.said.revision;
  }

  get nodes(): string[] {
    return this.said.nodes ?? [];
  }

  get problem(): string | undefined {
    return this.unreached ?? this.said.problem;
  }

  get isWaitedFor(): boolean {
    return this.standing.isWaitedFor;
  }

  get state(): MemberStatus["state"] {
    return this.standing.isLive && this.unreached === undefined ? "live" : "joining";
  }

  /** It has said something, where the log has come to a revision, or where that is not known. */
  hear(said: LiveMember, newest: number): void {
    this.said = said;
    // Whether it has what there was in its tree it sees by itself.
    if (said.live) this.standing.hear(said.known, said.known, newest);
    else this.standing.leaveOut(0);
  }
}

export class Quorum implements Above {
  readonly name: string;
  readonly tls: boolean;
  readonly #options: QuorumOptions;
  readonly #ended = new AbortController();
  readonly #equals = new Map<string, Equal>();
  #ledger: EtcdLedger | undefined;
  /** Ends what was joined, with what is wrong. */
  #fail: (error: unknown) => void = () => {};
  /** What this member has to have before it is live: all that was there when it joined. */
  #target = UNKNOWN;
  #alive: Alive | undefined;
  #isLeaving = false;
  /** To be appended. */
  #proposed: Proposed[] = [];
  #isAppending = false;
  #waiting: { revision: number; resolve: () => void }[] = [];
  /** Of those who were there once: forgotten after a month. */
  #seen: Member[] = [];
  readonly chain: string[] = [];
  received = 0;
  problem: string | undefined = "not joined yet";

  constructor(options: QuorumOptions) {
    this.#options = options;
    const { endpoints, name } = options.cluster;
    this.name = `etcd://${endpoints.map((endpoint) => new URL(endpoint).host)}/${name}`;
    this.tls = options.tls;
  }

  run(): Promise<void> {
    const lost = (error: RepriseError) => {
      this.#drop();
      this.#options.onLost(error);
    };
    return keepJoined(this.#ended.signal, (joined) => this.#join(joined), lost);
  }

  async #join(joined: () => void): Promise<never> {
    const { cluster, store, onJoined } = this.#options;
    // The others are known by another name at each start.
    const isSeen = store === FOLDER_STORE;
    const ledger = new EtcdLedger(new Etcd(cluster), { store, isSeen, warn: (text) => say("warn", text) });
    this.#ledger = ledger;
    await ledger.open();
    this.#target = UNKNOWN;
    this.#seen = await ledger.members();
    const failed = Promise.withResolvers<never>();
    this.#fail = failed.reject;
    this.problem = undefined;
    joined();
    onJoined({ kind: "joined", node: this.#options.node, ledger: ledger.id, secret: ledger.secret });
    return failed.promise;
  }

  #drop(): void {
    void this.#ledger?.close();
    this.#ledger = undefined;
    this.#fail = () => {};
    this.#proposed = [];
    this.#waiting = [];
    // Clients are still sent to those who were there last and answer: what they have can be read.
  }

  close(): void {
    this.#ended.abort(new RepriseError("interrupted"));
    this.#drop();
  }

  /** It ends soon: no client is sent here any more, and nobody waits for what it knows. */
  leave(): void {
    this.#isLeaving = true;
    // Who does not hear of it does so when the lease ends.
    this.#ledger?.leave().catch(() => {});
  }

  // ------------------------------------------------------------------------------------------------ the log

  read(after: number): void {
    const ledger = this.#ledger;
    if (!ledger) return;
    const { onMessage, newest } = this.#options;
    this.received = after;
    ledger.follow(
      after,
      {
        onStretch: (stretch) => {
          this.received = stretch.revision;
          onMessage({ kind: "stretch", stretch, pruned: ledger.pruned });
        },
        onMembers: (members, isCurrent) => this.#onMembers(members, isCurrent ? ledger.revision : UNKNOWN),
        onBeat: (node) => this.#onBeat(node),
        onCurrent: () => this.#onCurrent(ledger.revision),
        onLost: (error) => this.#fail(error),
        onBack: () => {},
        onRenewed: () => this.#fail(new RepriseError("busy", "the log is another now")),
      },
      newest(),
    );
  }

  /** All is there that was in the log when this member came: more it need not have to be live. */
  #onCurrent(revision: number): void {
    if (this.#target === UNKNOWN) this.#target = revision;
    for (const equal of this.#equals.values()) equal.hear(equal.said, revision);
    this.#tell();
    this.#options.onMembers();
  }

  propose(proposed: Proposed): void {
    if (!this.#ledger) return;
    this.#proposed.push(proposed);
    if (!this.#isAppending) void this.#appendAll();
  }

  /** What comes while something is appended is appended together. */
  async #appendAll(): Promise<void> {
    this.#isAppending = true;
    for (let ledger = this.#ledger; ledger && this.#proposed.length > 0; ledger = this.#ledger) {
      const { origin } = this.#proposed[0]!;
      const group = this.#proposed.filter((proposed) => proposed.origin === origin);
      this.#proposed = this.#proposed.filter((proposed) => proposed.origin !== origin);
      try {
        const proposals = group.flatMap(({ proposals }) => proposals);
        const { decisions } = await ledger.append(origin, proposals);
        this.#answer(ledger, group, decisions);
      } catch (error) {
        if (this.#ledger === ledger) this.#fail(error);
      }
    }
    this.#isAppending = false;
  }

  #answer(ledger: EtcdLedger, group: Proposed[], decisions: Decision[]): void {
    let at = 0;
    for (const { proposals, answer } of group) {
      const own = decisions.slice(at, at + proposals.length);
      at += proposals.length;
      const revision = Math.max(0, ...own.map((one) => ("revision" in one ? one.revision : one.refusedFor)));
      void this.#knownToAll(revision).then(() => this.#ledger === ledger && answer(own));
    }
  }

  /** Forgets deletions that all have, and members that have not been seen for long. */
  async prune(): Promise<void> {
    const ledger = this.#ledger;
    if (!ledger || !this.#alive) return;
    try {
      await ledger.prune(this.#alive.revision);
      this.#seen = await ledger.members();
    } catch (error) {
      if (this.#ledger === ledger) this.#fail(error);
    }
  }

  // ------------------------------------------------------------------------------------------------ the others

  get cluster(): string {
    return this.#options.cluster.name;
  }

  /** Those that are there and have files. */
  get equals(): Equal[] {
    return [...this.#equals.values()].filter(({ said }) => said.redirectOnly !== true);
  }

  get nodes(): string[] | undefined {
    if (this.#ledger && this.#target === UNKNOWN) return undefined;
    return this.equals.flatMap(({ node, nodes }) => [node, ...nodes]);
  }

  /** Those that were there and may come back. */
  get gone(): Member[] {
    return this.#seen.filter(({ node }) => node !== this.#options.node && !this.#equals.has(node));
  }

  /** This one takes its turn among them. */
  get isLive(): boolean {
    return this.#options.isServing && this.#alive !== undefined && isReached(this.#alive, this.#target);
  }

  /** Whom to ask for what is not known to be anywhere else. */
  get furthest(): Equal | undefined {
    const live = this.equals.filter(({ state }) => state === "live");
    return live.sort((a, b) => b.revision - a.revision)[0];
  }

  get isEveryoneHere(): boolean {
    const revision = this.#ledger?.revision ?? Number.POSITIVE_INFINITY;
    return this.gone.length === 0 && this.equals.every(({ state, said }) => state === "live" && said.known >= revision);
  }

  #onMembers(members: Map<string, LiveMember>, revision: number): void {
    for (const node of this.#equals.keys()) if (!members.has(node)) this.#equals.delete(node);
    for (const [node, said] of members) {
      if (node === this.#options.node) continue;
      const known = this.#equals.get(node);
      // One that was there before etcd was lost may have come anew since then.
      const isSame = known?.address === said.address && known.ledger === this.#ledger;
      const equal = isSame ? known : new Equal(node, said, this.#ledger);
      this.#equals.set(node, equal);
      equal.hear(said, revision);
    }
    this.#checkAll();
    this.#wake();
    this.#options.onMembers();
  }

  #onBeat(node: string): void {
    const equal = this.#equals.get(node);
    if (equal) equal.heardAt = performance.now();
  }

  #checkAll(): void {
    const now = performance.now();
    for (const equal of this.#equals.values()) {
      const isInDoubt = equal.unreached !== undefined || now - equal.heardAt > SILENT_MS;
      if (!equal.said.live || !isInDoubt || now - equal.checkedAt < CHECK_RETRY_MS) continue;
      equal.checkedAt = now;
      void this.#check(equal);
    }
  }

  async #check(equal: Equal): Promise<void> {
    try {
      await this.#options.check(equal.address, equal.node);
      equal.unreached = undefined;
    } catch (error) {
      equal.unreached = `not to be reached: ${error instanceof Error ? error.message : error}`;
    }
    this.#options.onMembers();
  }

  /** Resolves when this member and all that are live know of a revision. */
  #knownToAll(revision: number): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#waiting.push({ revision, resolve });
    this.#wake();
    return promise;
  }

  #wake(): void {
    // What this one has not heard of the ledger yet may be that another has become live.
    const waitedFor = this.equals.filter(({ isWaitedFor }) => isWaitedFor);
    const known = Math.min(this.#alive?.known ?? 0, ...waitedFor.map(({ said }) => said.known));
    const done = this.#waiting.filter(({ revision }) => revision <= known);
    this.#waiting = this.#waiting.filter(({ revision }) => revision > known);
    for (const { resolve } of done) resolve();
  }

  say(message: Alive): void {
    const isNews = !Bun.deepEquals(message, this.#alive);
    this.#alive = message;
    if (!isNews) return;
    this.#tell();
    this.#wake();
  }

  #tell(): void {
    const ledger = this.#ledger;
    const { node, address, isServing } = this.#options;
    if (!ledger || !this.#alive || this.#isLeaving) return;
    const { known, revision, nodes, problem } = this.#alive;
    const said = { node, address, known, revision, nodes, problem, live: this.isLive };
    ledger.beat({ ...said, redirectOnly: isServing ? undefined : true }).catch((error) => {
      if (this.#ledger === ledger) this.#fail(error);
    });
  }

  /** Once a second: a member that is there and takes nothing in is waited for no more, until it has caught up. */
  beat(): void {
    const now = performance.now();
    const revision = this.#ledger?.revision ?? 0;
    for (const equal of this.#equals.values()) {
      if (equal.standing.isStuck(revision, now)) equal.standing.leaveOut(revision);
    }
    this.#checkAll();
    this.#wake();
    this.#tell();
  }
}

function isReached({ known, revision, problem }: Alive, target: number): boolean {
  // What a member cannot have does not keep it from the rest: for that it sends clients on.
  return (problem === undefined ? revision : known) >= target;
}

/** Throws what keeps a server from joining: as `parseCluster` and `EtcdLedger.open`. */
export async function checkLedger(cluster: string, store: string | undefined): Promise<void> {
  const parsed = parseCluster(cluster);
  const ledger = new EtcdLedger(new Etcd(parsed), { store });
  try {
    await ledger.open();
  } finally {
    await ledger.close();
  }
}
