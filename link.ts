/**
 * [link] What two servers say to each other once one has joined the other. Every message is looked at before anything is
 * done about it: a member may be of another version, or not what it was taken for.
 */
import { type Connection, connect, formatAddress, isLoopback, sleep } from "./connection.ts";
import type { Decision, Proposal, Record, Stretch, Version } from "./ledger.ts";
import type { Address } from "./peer.ts";
import {
  DIRECT,
  decodeAnswer,
  encodeHello,
  encodeRequest,
  MAX_ANSWER_BYTES,
  RepriseError,
  splitPath,
} from "./protocol.ts";
import { isHidden } from "./storage.ts";

export const LINK_VERSION = 1;
/** Who has not been heard for so long has gone. */
export const LEASE_MS = 5_000;
/** What somebody has to know, as long as that is not known here; nobody knows that much. */
export const UNKNOWN = Number.POSITIVE_INFINITY;
/** A server lets who has the wrong token wait for its answer, up to ten seconds. */
const REFUSAL_MS = 15_000;
/** Who is called has to answer so soon: the one who wants to join waits for what comes of it, for LEASE_MS. */
const CALL_MS = 2_000;
const IN_CLEAR = "servers of two machines join by TLS alone (--tls-cert, --join tls://…) and with a replica token";
const FIRST_RETRY_MS = 200;
const LAST_RETRY_MS = 2_000;
/** Characters of the records in one LINK, for a frame of MAX_ANSWER_BYTES: each may be three bytes. */
const STRETCH_CHARACTERS = 160_000;
/** And of proposals, for one of MAX_REQUEST_BYTES; the longest path takes more than half of that. */
const PROPOSED_CHARACTERS = 12_000;

/**
 * `host` is "" where the master knows better; with `secret` it can call the member back. `below`: those who wait for this
 * one to have joined, so that servers which all wait for each other learn of it.
 */
export type Join = {
  kind: "join";
  version: number;
  /** Where its files are: see `storeOf`. */
  store: string;
  node: string;
  host: string;
  port: number;
  secret: string;
  below?: string[];
};

/** From the server that joins, the member, to the one that is joined, its master. */
export type FromMember =
  /** The first. */
  | Join
  /** In place of a join, from a master to who wants to join it, at the address that clients would be told. */
  | { kind: "call"; node: string }
  /** Wants all of the log that is newer. */
  | { kind: "read"; after: number }
  /** Changes of the member `origin`: this one, or one that has joined it. */
  | { kind: "propose"; id: number; origin: string; proposals: Proposal[] }
  | Alive;

/**
 * Once a second, and whenever it changes: how far stretches have come; how much of the log is known here and to all members
 * below; what the tree has of it; the members below.
 */
export type Alive = {
  kind: "alive";
  received: number;
  known: number;
  revision: number;
  nodes: string[];
  problem?: string | undefined;
};

export type FromMaster =
  | { kind: "joined"; node: string; ledger: string; secret: string }
  | { kind: "called"; node: string }
  /** Deletions up to `pruned` are forgotten. */
  | { kind: "stretch"; stretch: Stretch; pruned: number }
  | { kind: "decided"; id: number; decisions: Decision[] }
  /** Once a second: the servers that this one has joined, itself the last; the nodes that it hears of, itself too. */
  | { kind: "alive"; revision: number; chain: string[]; nodes?: string[] | undefined };

/** A change of a member's, from it to where the ledger is. */
export interface Proposed {
  origin: string;
  proposals: Proposal[];
  answer: (decisions: Decision[]) => void;
}

/** Where the log comes from, and changes go to: a master, or a ledger outside of the servers. */
export interface Above {
  readonly name: string;
  readonly tls: boolean;
  /** The servers above. */
  readonly chain: string[];
  /** Who is heard of there; undefined until that is known. */
  readonly nodes: string[] | undefined;
  /** How far the log has come from there. */
  received: number;
  /** Why it is not to be had. */
  problem: string | undefined;
  /** Joins, and again whenever it is lost, until `close`. */
  run(): Promise<void>;
  /** All of the log that is newer is wanted. */
  read(after: number): void;
  propose(proposed: Proposed): void;
  say(message: Alive): void;
  /** Once a second. */
  beat(): void;
  close(): void;
}

/** Joins, and again with a growing wait whenever that has failed or ended; `join` says by `joined` that it has. */
export async function keepJoined(
  signal: AbortSignal,
  join: (joined: () => void) => Promise<never>,
  lost: (error: RepriseError) => void,
): Promise<void> {
  for (let failures = 0; !signal.aborted; failures++) {
    try {
      await join(() => {
        failures = 0;
      });
    } catch (error) {
      if (signal.aborted) return;
      if (!(error instanceof RepriseError)) throw error;
      lost(error);
      const ms = Math.min(LAST_RETRY_MS, FIRST_RETRY_MS * 2 ** failures);
      await sleep(ms * (0.75 + Math.random() / 2), signal).catch(() => {});
    }
  }
}

/**
 * Whether a member is waited for, and whether clients are sent to it. A change is acknowledged once all who are waited for
 * know of it, and clients are sent to who knows all that was acknowledged: what came while it was not waited for, too. So a
 * member that comes, or comes back, is waited for first, and is live once it knows what there was at that moment.
 */
export class Standing {
  isWaitedFor = false;
  isLive = false;
  /** What it has to reach before it is waited for. */
  target: number;
  /** What may have been acknowledged without it. */
  #missed = UNKNOWN;
  #known = 0;
  #knownBefore = -1;
  #movedAt = performance.now();

  constructor(target: number) {
    this.target = target;
  }

  /** It knows so much of the log, and has reached so much of its target; `revision`: what may have been acknowledged. */
  hear(known: number, reached: number, revision: number): void {
    this.#known = known;
    if (!this.isWaitedFor && reached < this.target) return;
    this.isWaitedFor = true;
    if (this.#missed === UNKNOWN) this.#missed = revision;
    this.isLive ||= known >= this.#missed;
  }

  /** It is neither waited for nor live, until it has reached that much. */
  leaveOut(target: number): void {
    this.isWaitedFor = false;
    this.isLive = false;
    this.target = target;
    this.#missed = UNKNOWN;
  }

  /** Whether it is waited for, is behind a revision and has come no further for a lease; to be asked once a second. */
  isStuck(revision: number, now: number): boolean {
    const isMoving = this.#known >= revision || this.#known !== this.#knownBefore;
    this.#knownBefore = this.#known;
    if (isMoving) this.#movedAt = now;
    return this.isWaitedFor && now - this.#movedAt > LEASE_MS;
  }
}

// ---------------------------------------------------------------------------------------------------- ends

interface UpOptions {
  address: Address;
  token: string | undefined;
  ca: string | undefined;
  join: () => Join;
  onJoined: (message: Extract<FromMaster, { kind: "joined" }>) => void;
  onMessage: (message: FromMaster) => void;
  onLost: (error: RepriseError) => void;
}

/** The link to the master, made again whenever it is lost. */
export class Up implements Above {
  readonly address: Address;
  readonly name: string;
  readonly tls: boolean;
  readonly #options: UpOptions;
  readonly #ended = new AbortController();
  #connection: Connection | undefined;
  #isJoined = false;
  #heardAt = 0;
  #last = 0;
  readonly #waiting = new Map<number, Proposed["answer"]>();
  chain: string[] = [];
  nodes: string[] | undefined;
  received = 0;
  problem: string | undefined = "not joined yet";

  constructor(options: UpOptions) {
    this.#options = options;
    this.address = options.address;
    this.tls = options.address.tls === true;
    this.name = formatAddress(options.address.host, options.address.port);
  }

  run(): Promise<void> {
    const lost = (error: RepriseError) => {
      this.#drop();
      this.#options.onLost(error);
    };
    return keepJoined(this.#ended.signal, (joined) => this.#join(joined), lost);
  }

  read(after: number): void {
    this.received = after;
    this.say({ kind: "read", after });
  }

  propose({ origin, proposals, answer }: Proposed): void {
    if (!this.#isJoined) return;
    // Each LINK has as many as fit; the answer is put together again.
    const groups = inGroups(proposals);
    const answers: Decision[][] = [];
    let missing = groups.length;
    for (const [at, group] of groups.entries()) {
      const id = ++this.#last;
      this.#waiting.set(id, (decisions) => {
        answers[at] = decisions;
        if (--missing === 0) answer(answers.flat());
      });
      this.say({ kind: "propose", id, origin, proposals: group });
    }
  }

  #onDecided({ id, decisions }: Extract<FromMaster, { kind: "decided" }>): void {
    this.#waiting.get(id)?.(decisions);
    this.#waiting.delete(id);
  }

  say(message: FromMember): void {
    if (!this.#isJoined) return;
    const connection = this.#connection!;
    connection
      .send(encodeRequest({ action: "link", message }))
      .then(() => connection.flush())
      .catch((error) => connection.fail(error));
  }

  /**
   * Ends a link on which nothing was heard for a lease. The connection's own limit does not: what is said once a second goes
   * to the kernel, which takes it, though nobody may be there.
   */
  beat(): void {
    if (this.#isJoined && performance.now() - this.#heardAt > LEASE_MS)
      this.#connection?.fail(new RepriseError("timeout", `nothing was heard for ${LEASE_MS / 1000} s`));
  }

  close(): void {
    this.#ended.abort(new RepriseError("interrupted"));
    this.#drop();
  }

  #drop(): void {
    this.#connection?.close();
    this.#connection = undefined;
    this.#isJoined = false;
    this.nodes = [];
    this.#waiting.clear();
  }

  async #join(joined: () => void): Promise<never> {
    const { join, onJoined, onMessage } = this.#options;
    const { signal } = this.#ended;
    this.#connection = await open({ ...this.#options, ...this.address, timeoutMs: REFUSAL_MS, signal }, join());
    for (;;) {
      const message = readFromMaster(await nextLink(this.#connection));
      this.#heardAt = performance.now();
      if (message.kind === "joined") {
        this.#isJoined = true;
        this.#connection.timeoutMs = LEASE_MS;
        this.problem = undefined;
        this.chain = [message.node];
        this.nodes = undefined;
        joined();
        onJoined(message);
      } else if (!this.#isJoined) throw new RepriseError("bad_frame");
      else if (message.kind === "decided") this.#onDecided(message);
      else {
        if (message.kind === "alive") [this.chain, this.nodes] = [message.chain, message.nodes];
        onMessage(message);
      }
    }
  }
}

type OpenOptions = Address & { token: string | undefined; ca: string | undefined; signal?: AbortSignal };

/** Connects to a server, and begins a link; `timeoutMs` is for its answers. Throws `lost`, `insecure`, and what the server says. */
async function open(
  { host, port, tls = false, token, ca, signal, timeoutMs }: OpenOptions & { timeoutMs: number },
  first: FromMember,
): Promise<Connection> {
  const connection = await connect({
    host,
    port,
    tls,
    ca,
    signal,
    maxLength: MAX_ANSWER_BYTES,
    timeoutMs,
  });
  try {
    // The first message has a secret, too.
    if (!tls && !isLoopback(connection.peer)) throw new RepriseError("insecure", IN_CLEAR);
    await connection.send(encodeHello({ flags: DIRECT, ...(token !== undefined && { token }) }));
    await connection.send(encodeRequest({ action: "link", message: first }));
    await connection.flush();
    const frame = await connection.next();
    if (!frame) throw new RepriseError("lost", `${formatAddress(host, port)} closed the connection`);
    const answer = decodeAnswer(frame);
    if (answer.type === "error") throw answer.error;
    if (answer.type !== "welcome") throw new RepriseError("bad_frame");
    return connection;
  } catch (error) {
    connection.close();
    if (!(error instanceof RepriseError && error.code === "speaks_tls")) throw error;
    const address = formatAddress(host, port);
    throw new RepriseError("insecure", `${address}: TLS is spoken there; use tls://${address}`, error);
  }
}

async function nextLink(connection: Connection): Promise<{ [name: string]: unknown }> {
  for (;;) {
    const frame = await connection.next();
    if (!frame) throw new RepriseError("lost", "the other server closed the link");
    const answer = decodeAnswer(frame);
    if (answer.type === "error") throw answer.error;
    if (answer.type === "wait") continue;
    if (answer.type !== "link") throw new RepriseError("bad_frame");
    return answer.message;
  }
}

/** Asks who is at an address. Throws `refused` where that is not `node`, and as `open`. */
export async function call({ node, ...options }: OpenOptions & { node: string }): Promise<void> {
  const connection = await open({ ...options, timeoutMs: CALL_MS }, { kind: "call", node });
  try {
    const message = readFromMaster(await nextLink(connection));
    if (message.kind !== "called" || message.node !== node) throw new RepriseError("bad_frame");
  } finally {
    connection.close();
  }
}

/** As many of a stretch's records as fit into a frame; those of one revision always do. */
export function cut(stretch: Stretch): Stretch {
  let characters = 0;
  let end = stretch.records.findIndex(({ path }) => {
    characters += 200 + JSON.stringify(path).length;
    return characters > STRETCH_CHARACTERS;
  });
  // Those of one revision go together: whoever has come to it has all of them.
  while (end > 0 && stretch.records[end]!.revision === stretch.records[end - 1]!.revision) end--;
  if (end <= 0) return stretch;
  const records = stretch.records.slice(0, end);
  return { ...stretch, records, revision: records.at(-1)!.revision, ...(stretch.snapshot && { snapshot: "part" }) };
}

function inGroups(proposals: Proposal[]): Proposal[][] {
  const groups: Proposal[][] = [];
  let room = 0;
  for (const proposal of proposals) {
    const characters = 200 + JSON.stringify(proposal.path).length;
    if (room < characters) {
      groups.push([]);
      room = PROPOSED_CHARACTERS;
    }
    groups.at(-1)!.push(proposal);
    room -= characters;
  }
  return groups;
}

// ---------------------------------------------------------------------------------------------------- reading

type Fields = { [name: string]: unknown };

/** Throws `bad_frame`. */
export function readFromMember(message: Fields): FromMember {
  const { kind } = message;
  const isRight =
    (kind === "join" &&
      isHost(message.host) &&
      isWord(message.node, message.secret) &&
      isCount(message.version, message.port) &&
      isText(message.store) &&
      (message.below === undefined || isList(message.below, isText))) ||
    (kind === "call" && isText(message.node)) ||
    (kind === "read" && isCount(message.after)) ||
    (kind === "propose" && isCount(message.id) && isText(message.origin) && isList(message.proposals, isProposal)) ||
    (kind === "alive" &&
      isCount(message.received, message.known, message.revision) &&
      isList(message.nodes, isText) &&
      (message.problem === undefined || isText(message.problem)));
  if (!isRight) throw bad(kind);
  return message as FromMember;
}

/** Throws `bad_frame`. */
export function readFromMaster(message: Fields): FromMaster {
  const { kind } = message;
  const isRight =
    (kind === "joined" && isText(message.ledger) && isWord(message.node, message.secret)) ||
    (kind === "called" && isText(message.node)) ||
    (kind === "stretch" && isCount(message.pruned) && isStretch(message.stretch)) ||
    (kind === "decided" && isCount(message.id) && isList(message.decisions, isDecision)) ||
    (kind === "alive" &&
      isCount(message.revision) &&
      isList(message.chain, isText) &&
      (message.nodes === undefined || isList(message.nodes, isText)));
  if (!isRight) throw bad(kind);
  return message as FromMaster;
}

function isStretch(value: unknown): boolean {
  if (!isObject(value)) return false;
  const { after, revision, records, snapshot } = value as unknown as Stretch;
  return isCount(after, revision) && isList(records, isRecord) && [undefined, "part", "complete"].includes(snapshot);
}

function isRecord(value: unknown): boolean {
  if (!isObject(value)) return false;
  const { path, revision, origin, over } = value as unknown as Record;
  return isPath(path) && isCount(revision) && isVersion(value) && isText(origin) && isText(over);
}

function isProposal(value: unknown): boolean {
  if (!isObject(value)) return false;
  const { path, base, version } = value as unknown as Proposal;
  return isPath(path) && isCount(base) && isVersion(version);
}

function isVersion(value: unknown): boolean {
  if (!isObject(value)) return false;
  const { kind, size, mtime, sha256 } = value as unknown as Version;
  if (!isCount(size) || !Number.isSafeInteger(mtime) || !isText(sha256)) return false;
  return kind === "file" ? /^[0-9a-f]{64}$/.test(sha256) : (kind === "folder" || kind === "gone") && sha256 === "";
}

function isDecision(value: unknown): boolean {
  if (!isObject(value)) return false;
  const { revision, refusedFor } = value;
  return isCount(revision ?? refusedFor);
}

/** A name that a client may give, too: see `splitPath`. */
function isPath(value: unknown): boolean {
  if (typeof value !== "string" || value === "") return false;
  try {
    return !splitPath(value).some(isHidden);
  } catch {
    return false;
  }
}

function isText(value: unknown): boolean {
  return typeof value === "string" && value.length <= 1000;
}

/** What goes into HELLO, and into names. */
function isWord(...values: unknown[]): boolean {
  return values.every((value) => typeof value === "string" && /^[\w-]{1,100}$/.test(value));
}

/** A name or an address, or "". */
function isHost(value: unknown): boolean {
  return typeof value === "string" && /^[^\s\p{C}/,[\]]{0,255}$/u.test(value);
}

function isCount(...values: unknown[]): boolean {
  return values.every((value) => Number.isSafeInteger(value) && (value as number) >= 0);
}

function isObject(value: unknown): value is Fields {
  return typeof value === "object" && value !== null;
}

function isList(value: unknown, isItem: (item: unknown) => boolean): boolean {
  return Array.isArray(value) && value.every(isItem);
}

function bad(kind: unknown): RepriseError {
  return new RepriseError(
    "bad_frame",
    `not the reprise protocol: a LINK of kind ${JSON.stringify(kind)?.slice(0, 40)}`,
  );
}
