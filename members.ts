/**
 * The members below: the servers that have joined this one, each over a link. Who may join, what each is told of the log,
 * how far each is with it, and so when a change is known to all of them and to whom of them clients are sent.
 *
 * What they propose goes on to the keeper of cluster.ts. It has the log, and is a member of another server itself, or the
 * first master of all; the members know no difference.
 */
import { say } from "./command.ts";
import { formatAddress, sleep } from "./connection.ts";
import { addressOf, type FromKeeper, type KeeperSettings, type MemberStatus, storeOf, type ToKeeper } from "./hub.ts";
import {
  type Decision,
  type EmbeddedLedger,
  type Log,
  type Member,
  STRETCH_RECORDS,
  type Stretch,
  stretchOf,
} from "./ledger.ts";
import {
  type Above,
  type Alive,
  cut,
  type FromMaster,
  type FromMember,
  type Join,
  LEASE_MS,
  LINK_VERSION,
  type Proposed,
  readFromMember,
  Standing,
} from "./link.ts";
import { log, logRefusal } from "./log.ts";
import { ERRORS, quote, RepriseError } from "./protocol.ts";

/** How long a member is called back, which may still be about to listen. */
const CALLS_MS = 1_500;
const CALL_RETRY_MS = 300;
/** Records that a member has not yet answered for. */
const MAX_UNANSWERED = 10_000;
/** Of those who want to join. */
const MAX_REMEMBERED = 100;
const COPIED = "; if the root was copied from there, remove the .reprise in it";

interface MembersOptions {
  settings: KeeperSettings;
  /** This server's. */
  node: string;
  /** What they are told from. */
  log: () => Log;
  /** Where that is at the first master of all. */
  ledger: () => EmbeddedLedger | undefined;
  /** What this server has joined itself, if that is what it is to do. */
  above: () => Above | undefined;
  isOnline: () => boolean;
  /** All of the log is here that is to be: no snapshot is on its way. */
  isWhole: () => boolean;
  /** Somebody joins, who needs to know this, and to have all up to `target` in its tree to be a live member. */
  admit: () => { ledger: string; secret: string; target: number };
  /** Throws where that node does not answer, with that token, at an address. */
  call: (address: string, node: string, token: string) => Promise<void>;
  propose: (proposed: Proposed) => void;
  /** A member knows more of the log than there is. */
  onLaterLog: (ledger: EmbeddedLedger, address: string) => void;
  /** One has come or gone, or clients are sent to another choice of them. */
  onChange: () => void;
  /** One says how much of the log it knows, and whether its tree has more than it said before. */
  onProgress: (known: number, hasMore: boolean) => void;
  send: (message: FromKeeper) => void;
}

export class Members {
  readonly #options: MembersOptions;
  readonly #downs = new Map<string, Down>();
  /** Links of those who want to join and are not yet members: `worker:id`. */
  readonly #joining = new Set<string>();
  /** Why they were refused last, by their node, so that it is said once; and who waits for this one to have joined. */
  readonly #refused = new Map<string, string>();
  readonly #waiting = new Map<string, { at: number; nodes: string[] }>();
  readonly #gone = new Map<string, MemberStatus>();
  readonly #waitingForKnown: { revision: number; resolve: () => void }[] = [];

  constructor(options: MembersOptions) {
    this.#options = options;
  }

  get all(): Down[] {
    return [...this.#downs.values()];
  }

  /** They, and all below them. */
  get nodes(): string[] {
    return this.all.flatMap(({ node, nodes }) => [node, ...nodes]);
  }

  /** Also those that have gone, which is as they were then. */
  get statuses(): MemberStatus[] {
    const { revision } = this.#options.log();
    const there = this.all.map((down) => statusOf(down, down.isLive ? "live" : "joining", revision));
    return [...there, ...this.#gone.values()];
  }

  /** All that there ever were are there, and know all. */
  get isEveryoneHere(): boolean {
    const { revision } = this.#options.log();
    return this.#gone.size === 0 && this.all.every(({ isLive, known }) => isLive && known >= revision);
  }

  // ------------------------------------------------------------------------------------------------ links

  onWorker(worker: number, message: Exclude<ToKeeper, { kind: "announce" }>): void {
    const down = this.all.find((down) => down.worker === worker && down.id === message.id);
    if (message.kind === "unlinked") {
      this.#joining.delete(`${worker}:${message.id}`);
      if (down) this.#leave(down);
      return;
    }
    try {
      const said = readFromMember(message.message as { [name: string]: unknown });
      if (message.kind === "linked") return void this.#onLinked(worker, message.id, message.peer, said);
      if (down) this.#onMember(down, said);
    } catch (error) {
      if (!(error instanceof RepriseError)) throw error;
      const peer = message.kind === "linked" ? message.peer : down?.address;
      logRefusal(this.#logSettings, { event: "link", status: error.code, peer });
      this.#unlink(worker, message.id, error);
      if (down) this.#leave(down, error.code);
    }
  }

  workerEnded(worker: number): void {
    for (const key of this.#joining) if (key.startsWith(`${worker}:`)) this.#joining.delete(key);
    for (const down of this.all) if (down.worker === worker) this.#leave(down);
  }

  // ------------------------------------------------------------------------------------------------ joining

  async #onLinked(worker: number, id: number, peer: string, message: FromMember): Promise<void> {
    this.#joining.add(`${worker}:${id}`);
    try {
      if (message.kind === "call") return this.#onCall(worker, id, message.node);
      if (message.kind !== "join") throw new RepriseError("bad_frame");
      await this.#onJoin(worker, id, peer, message);
      this.#refused.delete(message.node);
    } catch (error) {
      if (!(error instanceof RepriseError)) throw error;
      this.#unlink(worker, id, error);
      this.#sayRefused(message.kind === "join" ? message.node : peer, peer, error);
    } finally {
      this.#joining.delete(`${worker}:${id}`);
    }
  }

  #onCall(worker: number, id: number, node: string): void {
    if (node !== this.#options.node) throw new RepriseError("refused", "refused: another server is at this address");
    this.#say(worker, id, { kind: "called", node });
  }

  async #onJoin(worker: number, id: number, peer: string, join: Join): Promise<void> {
    if (join.version !== LINK_VERSION)
      throw new RepriseError("version", `servers link by version ${LINK_VERSION} here, not ${join.version}`);
    const { settings, node, above, admit } = this.#options;
    const store = storeOf(settings.root);
    if (settings.redirectOnly)
      throw new RepriseError("refused", "refused: this server only sends clients on; join the same --cluster");
    if (join.store !== store)
      throw new RepriseError("refused", `refused: the files here are ${store}, and not ${quote(join.store)}`);
    if (join.node === node)
      throw new RepriseError("refused", `refused: that is this server itself; join another${COPIED}`);
    const up = above();
    if (up?.chain.includes(join.node)) throw circle();
    if (up && !this.#options.isOnline()) throw this.#notYet(up, join);
    const address = formatAddress(join.host === "" ? peer : join.host, join.port);
    if (!addressOf(address)) throw new RepriseError("refused", `refused: ${quote(address)} is no address`);
    await this.#callBack(address, join);
    if (!this.#joining.has(`${worker}:${id}`)) return;
    const old = this.#downs.get(join.node);
    if (old && old.address !== address)
      throw new RepriseError("refused", `refused: the member ${old.address} has the same name${COPIED}`);
    if (old) this.#unlinkDown(old, new RepriseError("busy", "it has joined again"));
    const { ledger, secret, target } = admit();
    const down = new Down({ worker, id, node: join.node, address }, target);
    this.#downs.set(join.node, down);
    this.#gone.delete(join.node);
    log(this.#logSettings, { event: "member", peer: address, status: "joined" });
    this.#say(worker, id, { kind: "joined", node, ledger, secret });
    this.#options.onChange();
  }

  /** Clients will be sent there: whoever is at that address must be the one who says so. */
  async #callBack(address: string, { node, secret }: { node: string; secret: string }): Promise<void> {
    const end = performance.now() + CALLS_MS;
    for (;;) {
      try {
        return await this.#options.call(address, node, secret);
      } catch (error) {
        if (!(error instanceof RepriseError)) throw error;
        if (performance.now() < end && (ERRORS[error.code].retry || error.code === "denied")) {
          await sleep(CALL_RETRY_MS);
          continue;
        }
        const what = `refused: the member cannot be called back at ${address}: ${error.message}`;
        throw new RepriseError("refused", `${what}; --advertise says where clients reach it`, error);
      }
    }
  }

  /** Those who wait for each other wait for ever, and are told. */
  #notYet(up: Above, { node, below = [] }: Join): RepriseError {
    if (this.#waiting.size >= MAX_REMEMBERED) this.#waiting.clear();
    this.#waiting.set(node, { at: performance.now(), nodes: [node, ...below].slice(0, MAX_REMEMBERED) });
    if (below.includes(this.#options.node)) return circle();
    return new RepriseError("busy", `that server has not joined ${up.name} itself yet`);
  }

  /** Those that want to join and cannot as long as this one has not joined. */
  get waitingNodes(): string[] {
    const now = performance.now();
    for (const [node, { at }] of this.#waiting) if (now - at > LEASE_MS) this.#waiting.delete(node);
    return [...new Set([...this.#waiting.values()].flatMap(({ nodes }) => nodes))].slice(0, MAX_REMEMBERED);
  }

  /** Whoever is refused tries again and again: that is no news. */
  #sayRefused(node: string, peer: string, error: RepriseError): void {
    if (this.#refused.get(node) === error.message) return;
    if (this.#refused.size >= MAX_REMEMBERED) this.#refused.clear();
    this.#refused.set(node, error.message);
    logRefusal(this.#logSettings, { event: "join", status: error.code, peer });
    say("warn", `${peer} may not join: ${error.message}`);
  }

  // ------------------------------------------------------------------------------------------------ what they say

  #onMember(down: Down, message: FromMember): void {
    down.heardAt = performance.now();
    switch (message.kind) {
      case "read":
        this.#onRead(down, message.after);
        break;
      case "propose":
        this.#onProposed(down, message);
        break;
      case "alive":
        this.#onAlive(down, message);
        break;
      default:
        throw new RepriseError("bad_frame");
    }
  }

  #onRead(down: Down, after: number): void {
    const ledger = this.#options.ledger();
    if (ledger && after > ledger.revision) this.#options.onLaterLog(ledger, down.address);
    else {
      down.begin(after);
      this.#pump(down);
    }
  }

  #onProposed(down: Down, { id, origin, proposals }: Extract<FromMember, { kind: "propose" }>): void {
    if (origin !== down.node && !down.nodes.includes(origin))
      throw new RepriseError("bad_frame", "a member proposes what another has changed");
    const answer = (decisions: Decision[]) => {
      if (this.#downs.get(down.node) === down) this.#say(down.worker, down.id, { kind: "decided", id, decisions });
    };
    this.#options.propose({ origin, proposals, answer });
  }

  #onAlive(down: Down, message: Alive): void {
    const wasLive = down.isLive;
    const wasBehind = down.revision;
    down.hear(message, this.#options.log().revision);
    if (down.isLive !== wasLive) {
      log(this.#logSettings, { event: "member", peer: down.address, status: "live" });
      this.#options.onChange();
    }
    this.#pump(down);
    this.#wakeKnown();
    this.#options.onProgress(message.known, down.revision !== wasBehind);
  }

  // ------------------------------------------------------------------------------------------------ what they are told

  /** Once a second. */
  tell(message: FromMaster): void {
    for (const { worker, id } of this.all) this.#say(worker, id, message);
  }

  /** There may be more of the log. */
  pump(): void {
    const made = new Map<string, Told>();
    for (const down of this.all) this.#pump(down, made);
  }

  /** Sends a member what it does not have of the log, as much at a time as it takes in. `made`: what others were sent. */
  #pump(down: Down, made = new Map<string, Told>()): void {
    // What is missing here is missing there: it must not be taken for deleted.
    if (!this.#options.isWhole()) return;
    const from = this.#options.log();
    const { revision } = from;
    while (down.sent !== undefined && (down.sent < revision || down.isWithinSnapshot || down.isBeginning)) {
      if (down.sent - down.received > MAX_UNANSWERED) return;
      const which = `${down.sent} ${down.isWithinSnapshot}`;
      const told = made.get(which) ?? toTell(from, down.sent, down.isWithinSnapshot);
      made.set(which, told);
      const { stretch } = told;
      // It begins with nothing.
      if (stretch.snapshot && !down.isWithinSnapshot) down.received = 0;
      down.isBeginning = false;
      down.isWithinSnapshot = stretch.snapshot === "part";
      down.sent = Math.max(stretch.revision, stretch.snapshot ? 0 : down.sent);
      this.#sayText(down, told.text);
    }
  }

  // ------------------------------------------------------------------------------------------------ what they know

  /** So much of the log is known to all who are waited for. */
  get known(): number {
    return Math.min(...this.all.filter(({ isWaitedFor }) => isWaitedFor).map(({ known }) => known));
  }

  /** Waits until all who are to be waited for know of a revision; one that goes is waited for no more. */
  knownToAll(revision: number): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#waitingForKnown.push({ revision, resolve });
    this.#wakeKnown();
    return promise;
  }

  #wakeKnown(): void {
    const { known } = this;
    while (this.#waitingForKnown[0] && this.#waitingForKnown[0].revision <= known)
      this.#waitingForKnown.shift()!.resolve();
  }

  /** It is there, and takes nothing in: nobody waits for it, and no client is sent there, until it has caught up. */
  #leaveOut(down: Down): void {
    down.standing.leaveOut(this.#options.log().revision);
    log(this.#logSettings, { event: "member", peer: down.address, status: "behind" });
    this.#wakeKnown();
    this.#options.onChange();
  }

  /** Once a second: ends the lease of who is silent, and leaves out who comes no further. */
  expire(): void {
    const now = performance.now();
    const { revision } = this.#options.log();
    for (const down of this.all) {
      if (now - down.heardAt > LEASE_MS) this.#unlinkDown(down, new RepriseError("idle", "nothing was heard for 5 s"));
      else if (down.standing.isStuck(revision, now)) this.#leaveOut(down);
    }
  }

  /** Who is not waited for yet has to have all up to here in its tree. */
  retarget(revision: number): void {
    for (const { standing } of this.all) if (!standing.isWaitedFor) standing.target = revision;
  }

  // ------------------------------------------------------------------------------------------------ leaving

  #leave(down: Down, status = "gone"): void {
    if (this.#downs.get(down.node) !== down) return;
    this.#note(down);
    this.#downs.delete(down.node);
    this.#gone.set(down.node, statusOf(down, "gone", this.#options.log().revision));
    log(this.#logSettings, { event: "member", peer: down.address, status });
    this.#wakeKnown();
    this.#options.onChange();
  }

  /** Ends the links of all, with what is wrong. */
  unlink(error: RepriseError): void {
    for (const down of this.all) this.#unlinkDown(down, error);
  }

  #unlinkDown(down: Down, error: RepriseError): void {
    this.#unlink(down.worker, down.id, error);
    this.#leave(down, error.code);
  }

  /** The ledger remembers how far they are. */
  note(): void {
    for (const down of this.all) this.#note(down);
  }

  #note({ node, address, revision }: Down): void {
    this.#options.ledger()?.join({ node, address, revision });
  }

  /** Those that the ledger remembers have gone, until they join again. */
  remember(ledger: EmbeddedLedger): void {
    for (const member of ledger.members()) this.#gone.set(member.node, statusOf(member, "gone", ledger.revision));
  }

  #say(worker: number, id: number, message: FromMaster): void {
    this.#sayText({ worker, id }, JSON.stringify(message));
  }

  #sayText({ worker, id }: Pick<Down, "worker" | "id">, text: string): void {
    this.#options.send({ worker, message: { kind: "say", id, text } });
  }

  #unlink(worker: number, id: number, error: RepriseError): void {
    this.#options.send({ worker, message: { kind: "unlink", id, code: error.code, text: error.message } });
  }

  get #logSettings() {
    return { log: this.#options.settings.log, worker: 0 };
  }
}

/** A stretch, and the message that it is. */
interface Told {
  stretch: Stretch;
  text: string;
}

function toTell(from: Log, after: number, isWithinSnapshot: boolean): Told {
  const stretch = cut(stretchOf(from, after, STRETCH_RECORDS, isWithinSnapshot));
  const message: FromMaster = { kind: "stretch", stretch, pruned: from.pruned };
  return { stretch, text: JSON.stringify(message) };
}

/** A member, where the log has come to `newest`. */
export function statusOf(
  { node, address, revision, problem }: Member & Pick<MemberStatus, "problem">,
  state: MemberStatus["state"],
  newest: number,
): MemberStatus {
  return { node, address, state, revision, lag: Math.max(0, newest - revision), problem };
}

export function circle(): RepriseError {
  return new RepriseError("refused", "refused: that would be a circle of servers that join each other");
}

/** A member, at the other end of a worker's link. */
class Down {
  readonly worker: number;
  /** Of the link, at that worker. */
  readonly id: number;
  readonly node: string;
  readonly address: string;
  /** Its target is what it has to have in its tree. */
  readonly standing: Standing;
  heardAt = performance.now();
  /** As it says: see `alive`. */
  received = 0;
  known = 0;
  revision = 0;
  nodes: string[] = [];
  problem: string | undefined;
  /** All up to here was sent; undefined until it has asked. */
  sent: number | undefined;
  isBeginning = false;
  isWithinSnapshot = false;

  constructor(from: Pick<Down, "worker" | "id" | "node" | "address">, target: number) {
    this.worker = from.worker;
    this.id = from.id;
    this.node = from.node;
    this.address = from.address;
    this.standing = new Standing(target);
  }

  get isLive(): boolean {
    return this.standing.isLive;
  }

  get isWaitedFor(): boolean {
    return this.standing.isWaitedFor;
  }

  /** It says how far it is, where the log has come to a revision. */
  hear({ received, known, revision, nodes, problem }: Alive, newest: number): void {
    // Nobody has received what was not sent: at the start of a snapshot, a member still speaks of what it had before.
    this.received = Math.min(received, this.sent ?? 0);
    Object.assign(this, { known, revision, nodes, problem });
    // What a member cannot have does not keep it from the rest: for that it sends clients on.
    this.standing.hear(known, problem === undefined ? revision : known, newest);
  }

  begin(after: number): void {
    this.sent = after;
    this.received = after;
    this.isWithinSnapshot = false;
    // Even nothing is an answer: it tells the member that it has all.
    this.isBeginning = true;
  }
}
