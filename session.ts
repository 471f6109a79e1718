/**
 * One connection of the server, from HELLO to its end: a loop that takes a request, answers it, and takes the next.
 *
 * No session holds more of a file than a chunk, and none goes on before the kernel has taken what it sent. Requests that
 * change something are put off while further ones are there already, and are then applied and answered together: see
 * changes.ts. Answers keep the order of the requests all the same.
 */
import type { Gate } from "./admission.ts";
import type { Change, Changes, Outcome, Upload } from "./changes.ts";
import { type Certificate, ChunkSize, type Connection, formatAddress, isLoopback, Pace } from "./connection.ts";
import { type Hub, type Link, orNothing, withTargets } from "./hub.ts";
import { type LogFields, type LogFormat, log, logBug, logRefusal } from "./log.ts";
import { version } from "./package.json";
import {
  BufferPool,
  type Content,
  DIRECT,
  decodeContent,
  decodeHello,
  decodeRequest,
  EntriesEncoder,
  type Entry,
  ERRORS,
  encodeDataHeader,
  encodeEnd,
  encodeError,
  encodeFile,
  encodeInfo,
  encodeMeta,
  encodeRedirect,
  encodeSum,
  encodeWait,
  encodeWelcome,
  type Frame,
  HEADER_BYTES,
  MAX_CONTENT_BYTES,
  MAX_REQUEST_BYTES,
  MAX_WHOLE_BYTES,
  type Meta,
  PROTOCOL_VERSION,
  type Put,
  quote,
  RepriseError,
  type Request,
  SUM_BYTES,
  TAKES_FILE,
  UNKNOWN_SIZE,
} from "./protocol.ts";
import type { SecretFiles } from "./secrets.ts";
import { join, type OpenFile, type Root } from "./storage.ts";
import { hasExpired, type Token, type Tokens } from "./tokens.ts";

const SOFTWARE = `reprise ${version}`;
/** Content of a DATA frame where it passes through our memory, which a thousand slow readers then share. */
const COPIED_CHUNK_BYTES = 64 * 1024;
/** Below this, copying costs less than the calls that avoid it, and several answers travel in one packet. */
const MIN_SENDFILE_BYTES = 64 * 1024;
/** At a limited rate, so many chunks a second. */
const PACED_CHUNKS = 8;
/** Changes that one session puts off; and all of a worker's together, for each holds a descriptor. */
const MAX_GROUP = 256;
const MAX_STAGED = 512;
/** Descriptors that a worker may so have open besides those of its connections. */
export const STAGED_DESCRIPTORS = MAX_STAGED + MAX_GROUP;
/** Statuses of requests that may come in any number from who may not make them: they are logged as refusals. */
const REFUSALS: ReadonlySet<string> = new Set(["denied", "read_only"]);
/** A peer that waits for its answer is told so this often. */
const WAIT_MS = 1_000;
/** Whoever connects has to say so long after that who it is; less, where `--idle-timeout` is. */
const HELLO_MS = 15_000;
/** Refused tokens of one worker whose answers wait; further ones get none, so that they hold no place. */
const MAX_DENIALS = 64;

/** What a worker is told by the supervisor, as JSON in the environment variable REPRISE_WORKER. */
export interface Settings extends SecretFiles {
  worker: number;
  workers: number;
  root: string;
  host: string;
  port: number;
  /** Over all workers, and of one address (0: no limit). */
  maxConnections: number;
  maxPerAddress: number;
  /** What the descriptors of one worker are enough for. */
  maxOfWorker: number;
  idleMs: number;
  /** Bytes a second that a peer must at least move while it is waited for. */
  minRate: number;
  graceMs: number;
  /** Bytes a second for one connection. */
  limitRate?: number | undefined;
  writable: boolean;
  /** Bytes of the largest file that is taken. */
  maxUpload?: number | undefined;
  /** Bytes that uploads leave free on the root's file system. */
  keepFree: number;
  /** Entries of one list. */
  maxList: number;
  /** Who needs no token may write from other machines as well. */
  anonymousWrite: boolean;
  /** Where chunks of a bucket's files are kept on this machine, and how much of its disk they may take. */
  cache?: { folder: string; maxBytes: number } | undefined;
  /** It is, or was, in a cluster: see `Hub`. */
  clustered: boolean;
  /** It has no files, and only sends clients on. */
  redirectOnly: boolean;
  log: LogFormat;
}

/** What the sessions of one worker share. */
export interface Worker {
  readonly settings: Settings;
  readonly root: Root;
  /** Undefined where the root is not to be written. */
  readonly changes: Changes | undefined;
  readonly gate: Gate;
  readonly hub: Hub;
  /** Refusals whose answer waits. */
  denials: number;
  /** Undefined where nobody needs one. Both may be others after SIGHUP. */
  tokens: Tokens | undefined;
  certificate: Certificate | undefined;
  readonly sessions: Set<Session>;
  /** Connections of which it is not known yet whether there is room for them. */
  entering: number;
  readonly startedAt: number;
  /** SIGTERM came: what runs may end, nothing new begins. */
  draining: boolean;
  /** The grace is over: transfers end at the next chunk. */
  stopping: boolean;
  /** Uploads that wait for their group. */
  staged: number;
}

/** A change whose content is there, and which is not yet made. */
interface Pending {
  change: Change;
  startedAt: number;
  bytes: number;
}

/** Memory for uploads, whose frames are large; what is not in use is shared by all sessions. */
export const uploadPool = new BufferPool(MAX_CONTENT_BYTES + 2 * HEADER_BYTES);
const free = (chunk: Uint8Array) => uploadPool.give(chunk);

export class Session {
  readonly #worker: Worker;
  readonly #connection: Connection;
  readonly #pace: Pace | undefined;
  readonly #peer: string;
  #state: "greeting" | "waiting" | "answering" | "linked" | "ending" = "greeting";
  /** What this peer sees as the root: the server's, or its token's folder. */
  #root: Root;
  #changes: Changes | undefined;
  #token: Token | undefined;
  /** While it is nothing else than one. */
  #link: Link | undefined;
  /** Called when a peer has gone that waits for what was announced: its place is not kept. */
  #onLost: ((error: RepriseError) => void) | undefined;
  /** Where the peer of the current request was sent, for the log. */
  #sentTo: string | undefined;
  /** Content sent for the current request, for the log. */
  #bytes = 0;
  #pending: Pending[] = [];
  #takesFile = false;
  #whyDenied: string | undefined;
  /** As much is collected as is sent together. */
  #isFull = false;
  /** The END of the current upload has come. */
  #ended = true;

  constructor(worker: Worker, connection: Connection) {
    this.#worker = worker;
    this.#connection = connection;
    this.#peer = connection.peer;
    this.#root = worker.root;
    this.#changes = worker.changes;
    this.#pace = worker.settings.limitRate ? new Pace(worker.settings.limitRate) : undefined;
    connection.timeoutMs = Math.min(HELLO_MS, worker.settings.idleMs);
    connection.owes = true;
  }

  /** Serves to the end of the connection, or until the client idles: the next byte calls it again. */
  async run(): Promise<void> {
    try {
      if (await this.#serve()) return;
      await this.#end();
    } catch (error) {
      this.#abandon();
      const reason = this.#isBetweenRequests ? this.#asRead(error) : error;
      await this.#refuse(reason).catch((bug) => logBug(this.#worker.settings, bug));
    }
    this.#leave();
  }

  #leave(): void {
    const { sessions, gate } = this.#worker;
    sessions.delete(this);
    gate.leave(this.#peer);
  }

  /** SIGTERM: a session between two requests ends, another when its answer is done. */
  drain(): void {
    this.#link?.end(new RepriseError("shutting_down"));
    if (this.#isBetweenRequests) this.#connection.fail(new RepriseError("shutting_down"));
  }

  get #isBetweenRequests(): boolean {
    return this.#state === "waiting" || this.#state === "greeting";
  }

  close(): void {
    this.#connection.close();
  }

  /** Returns whether the client idles rather than that it has ended. */
  async #serve(): Promise<boolean> {
    for (;;) {
      let frame = this.#ready();
      if (!frame && this.#connection.rest(this)) return true;
      frame ??= await this.#next();
      if (!frame) {
        await this.#apply();
        return false;
      }
      if (this.#state === "greeting") {
        const isWelcome = await this.#greet(frame);
        this.#state = "waiting";
        if (!isWelcome) return false;
        continue;
      }
      const request = decodeRequest(frame);
      if (!this.#isStillAllowed) throw await this.#denial();
      this.#state = "answering";
      if (request.action === "get" && this.#answerNow(request)) {
        if (this.#isFull) await this.#connection.flush();
      } else if (!(await this.#respond(request))) return false;
      if (this.#worker.draining) {
        await this.#apply();
        throw new RepriseError("shutting_down");
      }
      this.#state = "waiting";
    }
  }

  /** Whatever time it takes. Returns whether the connection goes on. */
  async #respond(request: Request): Promise<boolean> {
    if (isChange(request)) {
      await this.#take(request);
      return true;
    }
    await this.#apply();
    if (request.action === "link") return !(await this.#carry(request.message));
    await this.#answer(request);
    return request.action !== "quit";
  }

  async #next(): Promise<Frame | undefined> {
    try {
      return await this.#connection.next();
    } catch (error) {
      throw this.#asRead(error);
    }
  }

  /** What an error means that came of waiting for the client. */
  #asRead(error: unknown): unknown {
    if (!(error instanceof RepriseError)) return error;
    if (error.code === "timeout") return new RepriseError("idle", `closed for lack of activity: ${error.message}`);
    // Before HELLO a wrong checksum only tells that this is another protocol.
    const isOther = (error.code === "checksum" && this.#state === "greeting") || error.code === "speaks_tls";
    return isOther ? new RepriseError("bad_frame") : error;
  }

  /** A request that came with the one before it: the way of many small ones. */
  #ready(): Frame | undefined {
    return this.#state === "waiting" ? this.#connection.ready() : undefined;
  }

  /** A small file from memory, without any of what makes waiting possible; false leaves it to the usual way. */
  #answerNow({ action, path, offset, length, etag }: Extract<Request, { action: "get" }>): boolean {
    if (
      !this.#takesFile ||
      offset > 0 ||
      etag !== "" ||
      length < MAX_WHOLE_BYTES ||
      this.#pending.length > 0 ||
      this.#pace
    )
      return false;
    const startedAt = performance.now();
    try {
      const file = this.#root.readNow(path);
      if (!file || this.#worker.hub.versions.isBehind) return false;
      this.#isFull = this.#connection.collect(encodeFile(file.meta, file.content));
      this.#logRequest({ action, path, offset } as Request, startedAt, file.content.length, "ok");
      return true;
    } catch (error) {
      if (error instanceof RepriseError) return false;
      throw error;
    }
  }

  /** Returns whether the client is welcome here, and not sent on. */
  async #greet(frame: Frame): Promise<boolean> {
    const hello = decodeHello(frame);
    if (hello.version !== PROTOCOL_VERSION) {
      const text = `protocol version ${hello.version} is not spoken here, only ${PROTOCOL_VERSION}`;
      this.#state = "waiting";
      throw new RepriseError("version", text);
    }
    await this.#admit(hello.token);
    if ((hello.flags & DIRECT) === 0 && (await this.#sendOn())) return false;
    this.#takesFile = (hello.flags & TAKES_FILE) !== 0;
    this.#connection.maxLength = MAX_REQUEST_BYTES;
    this.#connection.timeoutMs = this.#worker.settings.idleMs;
    this.#connection.owes = false;
    await this.#connection.send(encodeWelcome(SOFTWARE));
    return true;
  }

  /** [redirect] Another member takes this client. Members themselves are not sent away. */
  async #sendOn(): Promise<boolean> {
    if (this.#token?.access === "replica") return false;
    const address = await this.#worker.hub.next();
    if (!address && this.#worker.settings.redirectOnly)
      throw new RepriseError("busy", "no server of the cluster is there to be sent to");
    if (!address) return false;
    const to = formatAddress(address.host, address.port);
    log(this.#worker.settings, { event: "redirect", status: "ok", to, ...this.#who });
    await this.#connection.send(encodeRedirect(address.host, address.port, address.isEqual));
    return true;
  }

  /** [access] Where tokens are needed, what this one leads to becomes the root. */
  async #admit(text: string): Promise<void> {
    const { tokens, root, changes, hub } = this.#worker;
    if (!tokens) return;
    // Both are looked through in any case: the time of an answer tells nothing.
    const [given, ofMember] = [tokens.find(text), hub.members.find(text)];
    this.#token = given ?? ofMember;
    if (!this.#token || !this.#isStillAllowed)
      throw await this.#denial(this.#token ? undefined : text === "" ? "no token" : "no such token");
    const { folder } = this.#token;
    if (folder === "") return;
    try {
      this.#root = await root.beneath(folder);
      this.#changes = changes?.beneath(folder);
    } catch (error) {
      if (!(error instanceof RepriseError)) throw error;
      // That may be right again in a moment.
      if (error.code === "failed") throw new RepriseError("busy");
      if (error.code === "busy") throw error;
      throw await this.#denial("the token's folder is not there");
    }
  }

  get #isStillAllowed(): boolean {
    const { tokens, hub } = this.#worker;
    return !this.#token || tokens?.holds(this.#token) === true || hub.members.holds(this.#token);
  }

  /** A path as the whole server has it. */
  #whole(path: string): string {
    return join(this.#token?.folder ?? "", path);
  }

  /**
   * [access] One answer for all that is not allowed, so that it does not tell why; the more failures, the later. Whoever
   * does not wait for it holds no place meanwhile and is told nothing, and nothing that comes meanwhile is kept. `why` is
   * for the log alone.
   */
  async #denial(why?: string): Promise<RepriseError> {
    const worker = this.#worker;
    await this.#apply();
    // Not sooner: what was taken before was not denied.
    this.#whyDenied =
      why ?? (this.#token && hasExpired(this.#token) ? "the token has expired" : "the token was removed or changed");
    await this.#connection.flush();
    const ms = await worker.gate.failed(this.#peer);
    const denied = new RepriseError(
      "denied",
      "access denied: no token (--token-file, REPRISE_TOKEN), or none that allows this",
    );
    if (worker.denials < MAX_DENIALS) {
      worker.denials++;
      const isHeard = await this.#connection.ignore(ms);
      worker.denials--;
      if (isHeard) return denied;
    }
    logRefusal(worker.settings, { status: denied.code, ...this.#who });
    return new RepriseError("lost");
  }

  /** Why nothing can be changed here, or undefined. */
  async #writeRefusal(): Promise<RepriseError | undefined> {
    const { settings, tokens } = this.#worker;
    if (tokens && this.#token?.access !== "write") return this.#denial(`the token is for ${this.#token?.access}`);
    if (!this.#changes) return readOnly("the server is read-only; started with --writable it takes changes");
    const { refusal } = this.#worker.hub.cluster ?? {};
    if (refusal !== undefined) return new RepriseError("busy", refusal);
    if (tokens || settings.anonymousWrite || isLoopback(this.#peer)) return undefined;
    return readOnly("without a token only this machine may change files; --tokens or --anonymous-write opens it");
  }

  /** One request, its answer and its line in the log. What is wrong with a request is an answer too. */
  async #answer(request: PlainRequest): Promise<void> {
    const startedAt = performance.now();
    this.#bytes = 0;
    let status = "ok";
    try {
      await this.#perform(request);
    } catch (error) {
      status = this.#statusOf(error);
      if (isOver(error)) throw error;
      await this.#connection.send(encodeError(asReprise(error)));
    } finally {
      this.#logRequest(request, startedAt, this.#bytes, status);
      this.#sentTo = undefined;
    }
  }

  #statusOf(error: unknown): string {
    if (error instanceof RepriseError) return error.code;
    logBug(this.#worker.settings, error);
    return "failed";
  }

  #logRequest(request: Request | Change, startedAt: number, bytes: number, status: string): void {
    const { path, to, offset } = ("request" in request ? request.request : request) as {
      path?: string;
      to?: string;
      offset?: number;
    };
    const ms = Math.round(performance.now() - startedAt);
    const line = { event: request.action, path, to: to ?? this.#sentTo, offset, bytes, ms, status, ...this.#who };
    if (REFUSALS.has(status)) logRefusal(this.#worker.settings, line);
    else log(this.#worker.settings, line);
  }

  async #perform(request: PlainRequest): Promise<void> {
    switch (request.action) {
      case "get":
        return this.#get(request);
      case "list":
        return this.#list(request.path, request.recursive);
      case "stat":
        return this.#stat(request.path);
      case "status":
        return this.#sayStatus();
      case "quit":
        return this.#connection.send(encodeEnd(0));
      case "sums":
        return this.#sums(request);
    }
  }

  async #sayStatus(): Promise<void> {
    const problem = await this.#worker.root.problem?.();
    await this.#connection.send(encodeInfo(describe(this.#worker, this.#token, problem)));
  }

  // ------------------------------------------------------------------------------------------------ link

  /** [link] Returns whether there was one: by then the connection is at its end. */
  async #carry(message: Record<string, unknown>): Promise<boolean> {
    const { settings, hub, draining } = this.#worker;
    const refusal = await this.#linkRefusal(message);
    if (refusal) {
      // What closes the connection has been logged if nobody heard it.
      if (refusal.code !== "lost") logRefusal(settings, { event: "link", status: refusal.code, ...this.#who });
      if (isOver(refusal)) throw refusal;
      await this.#connection.send(encodeError(refusal));
      return false;
    }
    const link = hub.link(this.#connection, message);
    this.#link = link;
    this.#state = "linked";
    if (draining) this.drain();
    try {
      // What comes of it is logged by the keeper, who knows which of them are news.
      await link.carry(() => this.#nextOfLink());
    } finally {
      hub.unlink(link);
    }
    return true;
  }

  async #nextOfLink(): Promise<Frame | undefined> {
    const frame = await this.#next();
    if (!this.#isStillAllowed) throw await this.#denial();
    return frame;
  }

  /** Why this peer is no member, or undefined. */
  async #linkRefusal({ kind }: Record<string, unknown>): Promise<RepriseError | undefined> {
    const { tokens, hub } = this.#worker;
    if (tokens) {
      // What members know each other by is for being called back: who was a member once is not to join by that.
      const isKnown = this.#token !== undefined && kind !== "call" && hub.members.holds(this.#token);
      const isMember = this.#token?.access === "replica" && this.#token.folder === "" && !isKnown;
      return isMember ? undefined : this.#denial("no replica token of the whole root");
    }
    if (isLoopback(this.#peer)) return undefined;
    const why = "only servers on this machine may join without tokens; --tokens at the server that is joined opens it";
    return new RepriseError("refused", `refused: ${why}`);
  }

  // ------------------------------------------------------------------------------------------------ changes

  /** Takes what belongs to a change, and puts the change itself off. What is wrong with it is answered at once. */
  async #take(request: ChangeRequest): Promise<void> {
    const startedAt = performance.now();
    this.#bytes = 0;
    try {
      if (request.action === "put") this.#expectContent(request);
      const refusal = await this.#writeRefusal();
      if (refusal) throw refusal;
      const change = request.action === "put" ? await this.#receive(request, this.#changes!) : request;
      this.#pending.push({ change, startedAt, bytes: this.#bytes });
      this.#connection.beforeWait ??= () => this.#apply();
      if (change.action === "put") this.#worker.staged++;
    } catch (error) {
      await this.#apply();
      this.#logRequest(request, startedAt, this.#bytes, this.#statusOf(error));
      if (isOver(error)) throw error;
      await this.#connection.send(encodeError(asReprise(error)));
      if (request.action === "put") await this.#passOver();
    }
    if (this.#pending.length >= MAX_GROUP || this.#worker.staged >= MAX_STAGED) await this.#apply();
  }

  #expectContent(request: Put): void {
    this.#ended = request.content !== undefined;
    if (this.#ended) return;
    this.#connection.maxLength = MAX_CONTENT_BYTES;
    this.#connection.owes = true;
    // Of one as large as that, on a slow line, the next byte is as much as can be asked for.
    this.#connection.promptFrames = false;
  }

  /** An upload up to its END. Throws in the middle of it what makes the rest useless. */
  async #receive(request: Put, changes: Changes): Promise<Upload> {
    const received = changes.receive(request, request.size <= MAX_CONTENT_BYTES);
    // Small files are not to wait for what is there.
    const upload = received instanceof Promise ? await received : received;
    const timer = this.#ended ? undefined : setInterval(() => this.#sayWaitUnlessOwed(), WAIT_MS);
    try {
      if (request.content) {
        this.#bytes = request.content.length;
        upload.write(request.content);
        return upload;
      }
      await this.#receiveContent(upload);
      return upload;
    } catch (error) {
      await upload.settle().catch(() => {});
      upload.close();
      throw error;
    } finally {
      clearInterval(timer);
    }
  }

  async #receiveContent(upload: Upload): Promise<void> {
    const { offset, size, path } = upload.request;
    for (;;) {
      const content = await this.#nextContent();
      if (content.type === "end") {
        await upload.settle();
        const whole = content.count === upload.bytes - offset && (size === UNKNOWN_SIZE || size === upload.bytes);
        if (whole) return;
        await upload.drop();
        throw new RepriseError("refused", `refused: ${quote(path)} ended at byte ${upload.bytes}, not as announced`);
      }
      if (!this.#isStillAllowed) throw await this.#denial();
      this.#bytes += content.content.length;
      if (offset + this.#bytes > size) {
        await upload.drop();
        throw new RepriseError("refused", `refused: ${quote(path)} is longer than announced`);
      }
      await upload.append(content.content, content.crc32, free);
      await this.#pace?.take(content.content.length);
      if (this.#worker.stopping) throw new RepriseError("shutting_down");
    }
  }

  /** The rest of an upload that was refused. */
  async #passOver(): Promise<void> {
    while (!this.#ended) {
      const content = await this.#nextContent();
      if (content.type === "data") free(content.content);
    }
  }

  async #nextContent(): Promise<Content> {
    const frame = await this.#next();
    if (!frame) throw new RepriseError("lost", "the client ended in the middle of an upload");
    const content = decodeContent(frame);
    if (content.type === "end") {
      this.#ended = true;
      this.#connection.maxLength = MAX_REQUEST_BYTES;
      this.#connection.owes = false;
      this.#connection.promptFrames = true;
    }
    return content;
  }

  /** Makes what was put off, all together, and answers it. */
  async #apply(): Promise<void> {
    const changes = this.#changes;
    if (this.#pending.length === 0 || !changes) return;
    const group = this.#pending;
    this.#pending = [];
    this.#connection.beforeWait = undefined;
    const timer = setInterval(() => this.#sayWait(), WAIT_MS);
    try {
      const outcomes = await this.#make(group, changes);
      if (this.#worker.hub.isClustered) await this.#announce(group, outcomes);
      for (const [index, { change, startedAt, bytes }] of group.entries()) {
        const outcome = this.#named(change, outcomes[index]);
        // It is said, and the connection ends with it: those behind are asked for again.
        if (isOver(outcome)) throw this.#loggedFor(group.slice(index), outcome);
        await this.#connection.send(encodeOutcome(outcome));
        this.#logRequest(change, startedAt, bytes, outcome instanceof RepriseError ? outcome.code : "ok");
      }
    } finally {
      clearInterval(timer);
    }
  }

  /** Each has its outcome, whatever happens: one too few, and all behind it would be taken for another's. */
  async #make(group: Pending[], changes: Changes): Promise<Outcome[]> {
    try {
      const paths = group.flatMap(({ change }) => pathsOf(change)).map((path) => this.#whole(path));
      await this.#worker.hub.caughtUp(paths);
      return await changes.apply(group.map(({ change }) => change));
    } catch (error) {
      if (isOver(error)) throw this.#loggedFor(group, error);
      this.#statusOf(error);
      return group.map(() => asReprise(error));
    } finally {
      this.#letGo(group);
    }
  }

  /** In a cluster, what is acknowledged is known to all who are there. */
  async #announce(group: Pending[], outcomes: Outcome[]): Promise<void> {
    const lost = Promise.withResolvers<never>();
    const made = group.filter((_, index) => !(outcomes[index] instanceof RepriseError));
    const paths = made.flatMap(({ change }) => pathsOf(change)).map((path) => this.#whole(path));
    try {
      this.#onLost = lost.reject;
      await Promise.race([this.#worker.hub.announce(paths), lost.promise]);
    } catch (error) {
      throw this.#loggedFor(group, error);
    } finally {
      this.#onLost = undefined;
    }
  }

  /** What ends the connection is the outcome of all of them. */
  #loggedFor(group: Pending[], error: unknown): unknown {
    for (const { change, startedAt, bytes } of group) this.#logRequest(change, startedAt, bytes, this.#statusOf(error));
    return error;
  }

  /** By now the version may have another name than the one it was made with. */
  #named(change: Change, outcome: Outcome): Outcome {
    if (change.action !== "put" || !outcome || outcome instanceof RepriseError) return outcome;
    return { ...outcome, etag: this.#worker.hub.versions.of(this.#whole(change.request.path), outcome.etag) };
  }

  /** Not while the peer owes content: else a stalled upload looks alive to both sides, and no limit ends it. */
  #sayWaitUnlessOwed(): void {
    if (!this.#connection.isQuiet(WAIT_MS)) this.#sayWait();
  }

  #sayWait(): void {
    this.#connection
      .send(encodeWait())
      .then(() => this.#connection.flush())
      .catch((error) => {
        this.#connection.fail(asReprise(error));
        this.#onLost?.(asReprise(error));
      });
  }

  #abandon(): void {
    this.#letGo(this.#pending);
    this.#pending = [];
  }

  #letGo(group: Pending[]): void {
    for (const { change } of group) {
      if (change.action !== "put") continue;
      this.#worker.staged--;
      try {
        change.close();
      } catch (error) {
        // The others are to be let go all the same.
        logBug(this.#worker.settings, error);
      }
    }
  }

  async #sums({ id, path }: Extract<Request, { action: "sums" }>): Promise<void> {
    const refusal = id === "" ? undefined : await this.#writeRefusal();
    if (refusal) throw refusal;
    const sums = id === "" ? this.#sumsOf(path) : this.#changes!.sums(id);
    let count = 0;
    for await (const { length, crc32 } of sums) {
      count += length;
      await this.#connection.send(encodeSum(length, crc32));
      await this.#connection.flush();
    }
    await this.#connection.send(encodeEnd(count));
  }

  async *#sumsOf(path: string): AsyncGenerator<{ length: number; crc32: number }> {
    const file = await this.#root.open(path);
    try {
      const { size } = file.meta;
      for (let at = 0; at < size; at += SUM_BYTES) {
        const length = Math.min(SUM_BYTES, size - at);
        yield { length, crc32: await file.checksum(at, length) };
      }
    } finally {
      file.close();
    }
  }

  // ------------------------------------------------------------------------------------------------ reading

  async #stat(path: string): Promise<void> {
    if (await this.#isElsewhere(path)) return;
    await this.#connection.send(encodeMeta(await this.#root.stat(path)));
  }

  /** [redirect] Tells where a version is that counts and is not here. Throws `not_found` where it is that nothing is. */
  async #isElsewhere(path: string, etag?: string): Promise<boolean> {
    const place = this.#worker.hub.placeOf(this.#whole(path), etag);
    if (place === undefined) return false;
    if (place === "gone") throw new RepriseError("not_found", `not found: ${quote(path)}`);
    this.#sentTo = formatAddress(place.host, place.port);
    await this.#connection.send(encodeRedirect(place.host, place.port, true));
    return true;
  }

  async #get({ path, offset, length, etag }: Extract<Request, { action: "get" }>): Promise<void> {
    if (await this.#isElsewhere(path, etag)) return;
    const file = await this.#root.open(path);
    try {
      const { meta } = file;
      if (etag !== "" && etag !== meta.etag) throw new RepriseError("changed", `changed on the server: ${quote(path)}`);
      if (offset > meta.size)
        throw new RepriseError("bad_range", `${quote(path)} has no byte ${offset}, only ${meta.size}`);
      await this.#connection.send(encodeMeta(meta, offset));
      const end = Math.min(meta.size, offset + length);
      file.expect?.(end);
      await this.#sendContent(file, offset, end);
      await this.#connection.send(encodeEnd(this.#bytes));
    } finally {
      file.close();
    }
  }

  async #sendContent(file: OpenFile, from: number, end: number): Promise<void> {
    const size = new ChunkSize(this.#mostChunkBytes());
    for (let at = from; at < end; ) {
      if (this.#worker.stopping) throw new RepriseError("shutting_down");
      const startedAt = performance.now();
      // Up to the next multiple: so the pieces are the same for everyone, and their checksums are kept.
      const length = Math.min(end - at, size.bytes - (at % size.bytes));
      await this.#sendChunk(file, at, length);
      at += length;
      this.#bytes += length;
      if (this.#pace) await this.#connection.flush();
      size.took(performance.now() - startedAt);
      await this.#pace?.take(length);
    }
  }

  #mostChunkBytes(): number {
    const most = this.#connection.canSendFile ? MAX_CONTENT_BYTES : COPIED_CHUNK_BYTES;
    if (!this.#pace) return most;
    return Math.max(1, Math.min(most, Math.floor(this.#pace.rate / PACED_CHUNKS)));
  }

  async #sendChunk(file: OpenFile, offset: number, length: number): Promise<void> {
    const isForSendFile = this.#connection.canSendFile && length >= MIN_SENDFILE_BYTES;
    if (!isForSendFile || !(await file.descriptorFor(offset, length))) return this.#sendRead(file, offset, length);
    const crc32 = await file.checksum(offset, length);
    // Only now: what was damaged may lie elsewhere by this time, and its descriptor be somebody else's.
    const extent = await file.descriptorFor(offset, length);
    if (!extent) return this.#sendRead(file, offset, length);
    await this.#connection.send(encodeDataHeader(length, crc32));
    try {
      await this.#connection.sendFile(extent.fd, extent.offset, length);
    } catch (error) {
      // The frame is cut: no further frame could be told from its content.
      this.#connection.close();
      throw error;
    }
    file.verify();
  }

  async #sendRead(file: OpenFile, offset: number, length: number): Promise<void> {
    const content = await file.read(offset, length);
    await this.#connection.send(encodeDataHeader(length, Bun.hash.crc32(content)));
    return this.#connection.send(content);
  }

  async #list(path: string, recursive: boolean): Promise<void> {
    const frames = new EntriesEncoder();
    let count = 0;
    for await (const entries of this.#entries(path, recursive)) {
      if (this.#worker.stopping) throw new RepriseError("shutting_down");
      if (count + entries.length > this.#worker.settings.maxList) throw tooLong(path, recursive, this.#worker);
      for (const entry of entries) {
        const frame = frames.add(entry);
        if (frame) await this.#send(frame);
      }
      count += entries.length;
    }
    const rest = frames.rest();
    if (rest) await this.#send(rest);
    await this.#connection.send(encodeEnd(count));
  }

  /** What is here or, where something newer is elsewhere, that in its place. */
  #entries(path: string, recursive: boolean): AsyncIterable<Entry[]> {
    const { hub } = this.#worker;
    const entries = this.#root.list(path, recursive);
    if (!hub.isClustered) return entries;
    const whole = this.#whole(path);
    const folder = hub.targetOf(whole);
    if (folder?.kind === "gone") throw new RepriseError("not_found", `not found: ${quote(path)}`);
    const targets = hub.targetsBelow(whole);
    if (targets.size === 0 && !folder) return entries;
    return withTargets(folder?.kind === "folder" ? orNothing(entries) : entries, targets, recursive);
  }

  #send(frame: Uint8Array): Promise<void> {
    this.#bytes += frame.length;
    return this.#connection.send(frame);
  }

  /** Ends the connection over an error: says it where that can be understood, and logs what no request accounts for. */
  async #refuse(error: unknown): Promise<void> {
    const { code } = asReprise(error);
    if (!(error instanceof RepriseError)) logBug(this.#worker.settings, error);
    if (this.#state !== "answering" && code !== "lost")
      logRefusal(this.#worker.settings, { status: code, ...this.#who });
    // Who had all the time for the TLS handshake gets no more of it to be told so.
    const isHeard = code !== "lost" && code !== "timeout" && !(code === "idle" && this.#connection.isShaking);
    if (ERRORS[code].closes && isHeard) {
      await this.#connection.send(encodeError(asReprise(error))).catch(() => {});
      await this.#end();
    } else this.#connection.close();
  }

  async #end(): Promise<void> {
    this.#state = "ending";
    await this.#connection.finish();
  }

  get #who(): Pick<LogFields, "peer" | "token" | "why"> {
    return { peer: this.#peer, token: this.#token?.name, why: this.#whyDenied };
  }
}

type PlainRequest = Exclude<Request, ChangeRequest | { action: "link" }>;
type ChangeRequest = Extract<Request, { action: "put" | "remove" | "move" | "mkdir" }>;

function isChange(request: Request): request is ChangeRequest {
  return ["put", "remove", "move", "mkdir"].includes(request.action);
}

function pathsOf(change: Change): string[] {
  if (change.action === "put") return [change.request.path];
  return "to" in change ? [change.path, change.to] : [change.path];
}

function readOnly(why: string): RepriseError {
  return new RepriseError("read_only", `refused: ${why}`);
}

function tooLong(path: string, recursive: boolean, { settings }: Worker): RepriseError {
  const what = `refused: ${path === "" ? "the list" : `the list of ${quote(path)}`} has more than ${settings.maxList} entries`;
  const advice = recursive ? "list its folders one by one" : "ask for what is in it by its name";
  return new RepriseError("refused", `${what} (--max-list); ${advice}`);
}

/** [put] [change] */
function encodeOutcome(outcome: Meta | RepriseError | undefined): Uint8Array {
  if (outcome instanceof RepriseError) return encodeError(outcome);
  return outcome ? encodeMeta(outcome, outcome.size) : encodeEnd(0);
}

/** Whether an error leaves no connection to answer on. */
function isOver(error: unknown): error is RepriseError {
  return error instanceof RepriseError && ERRORS[error.code].closes;
}

function asReprise(error: unknown): RepriseError {
  return error instanceof RepriseError
    ? error
    : new RepriseError("failed", "the server failed; its log says more", error);
}

/** [status] Problems name paths, which are nothing for who sees one folder alone. */
function describe(
  { settings, sessions, startedAt, hub }: Worker,
  token: Token | undefined,
  ofStorage: string | undefined,
): Record<string, unknown> {
  const { role = "alone", node, master, revision, problem = ofStorage, replicas = [] } = hub.cluster ?? {};
  const seesAll = token === undefined || token.folder === "";
  return {
    server: SOFTWARE,
    protocol: PROTOCOL_VERSION,
    workers: settings.workers,
    worker: settings.worker,
    connections: sessions.size,
    uptime: Math.round((Date.now() - startedAt) / 1000),
    writable: settings.writable,
    role,
    node,
    master,
    revision,
    problem: seesAll ? problem : undefined,
    replicas: replicas.map(({ isEqual, problem, ...replica }) => ({
      ...replica,
      problem: seesAll ? problem : undefined,
    })),
  };
}
