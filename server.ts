#!/usr/bin/env bun
/**
 * The reprise server: gives away the files of a folder, over one TCP port, to any number of clients.
 *
 * ```sh
 * bun server.ts                                # server_root/ on 127.0.0.1:2121
 * bun server.ts /srv/files --host 0.0.0.0      # another folder, to everyone who can reach this machine
 * bun server.ts --port 0 --workers 2           # a free port, named in the first line on stdout
 * bun server.ts s3://BUCKET/PREFIX             # the objects of a bucket, by AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, …
 * ```
 *
 * The process that is started touches no client. It is the supervisor: it finds the port, starts the workers, which all
 * listen on it (the kernel spreads the connections), starts a worker again that dies, and hands signals on. A worker
 * runs one `Session` for each connection: see session.ts. With others in a cluster there is one process more, the keeper,
 * to which workers speak through the supervisor: see hub.ts.
 *
 * ```sh
 * bun server.ts other_root --port 2122 --join 127.0.0.1:2121     # the same files, and some of the clients
 * ```
 */
import { existsSync, readFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import type { Subprocess, TCPSocketListener } from "bun";
import { Admission, Gate, type Question, type Reply, type Verdict } from "./admission.ts";
import { type Bucket, isBucket, openBucket, type Refusal } from "./bucket.ts";
import { openBucketChanges } from "./bucketput.ts";
import { CACHE_DESCRIPTORS, Cache } from "./cache.ts";
import { type Changes, openChanges } from "./changes.ts";
import {
  type Args,
  command,
  isTerminal,
  numberOption,
  print,
  runScript,
  say,
  secondsOption,
  sizeOption,
  usage,
} from "./command.ts";
import { accept, type Connection, formatAddress, isEverywhere, isLoopback, listen } from "./connection.ts";
import {
  addressOf,
  FOLDER_STORE,
  type ForWorker,
  type FromWorker,
  Hub,
  INDEX,
  KeeperHost,
  type KeeperSettings,
  LEDGER,
  Restarts,
  storeOf,
} from "./hub.ts";
import { log, logBug, logRefusal } from "./log.ts";
import { version } from "./package.json";
import { DEFAULT_PORT, type ErrorCode, encodeError, MAX_HELLO_BYTES, quote, RepriseError } from "./protocol.ts";
import { readCertificateOf, readSecrets, readTokensOf, type Secrets } from "./secrets.ts";
import { Session, type Settings, STAGED_DESCRIPTORS, uploadPool, type Worker } from "./session.ts";
import { noRoot, openFolder } from "./storage.ts";
import { notify, notifyReloading } from "./systemd.ts";
import { Tokens, token } from "./tokens.ts";

/** After so many in a row that did not come to listen, the supervisor gives up. */
const MAX_FAILED_STARTS = 5;
/** How long all workers together may take to listen. */
const START_MS = 20_000;
/** Connections over the limit that are told so at the same time. */
const MAX_TURNED_AWAY = 64;
/** How long one of them may take to hear it. */
const TURN_AWAY_MS = 5_000;
/** Descriptors that a worker needs for itself, and for those that it turns away. */
const OWN_DESCRIPTORS = 64 + MAX_TURNED_AWAY;
/** Of each connection: its socket, and the file that it is about; and the two folders of a change. */
const DESCRIPTORS_EACH = 2;
const FOLDERS_EACH = 2;
/** What a cache may take if nothing is said, and the least that it may be given: some chunks of each worker. */
const CACHE_BYTES = 10 * 1024 ** 3;
const MIN_CACHE_BYTES = 64 * 1024 ** 2;
/** How long a stopping process waits for what it has told to end. */
const STOP_MS = 800;
/** A worker looks this often for what uploads that were given up have left. */
const SWEEP_MS = 3600 * 1000;

/** From the supervisor to a worker: end when what runs has ended; end now; use these from now on, at first to begin. */
type Order = "drain" | "stop" | { secrets: Secrets };
/** From one worker to the others, by way of the supervisor: what keeps files from being stored, undefined for nothing more. */
interface StorageNews {
  kind: "storage";
  refusal?: Refusal | undefined;
}

// ---------------------------------------------------------------------------------------------------- worker

/** Serves until a signal comes or the supervisor is gone, once that has said with which secrets. */
function work(settings: Settings): void {
  const isReplicated = storeOf(settings.root) === FOLDER_STORE && !settings.redirectOnly;
  const hub = new Hub({ ...settings, isReplicated }, (message) => process.send?.(message));
  const { bucket, ...storage } = openStorage(settings, hub);
  const worker: Worker = {
    settings,
    ...storage,
    gate: new Gate((question) => process.send?.(question)),
    hub,
    tokens: undefined,
    certificate: undefined,
    sessions: new Set(),
    entering: 0,
    denials: 0,
    startedAt: Date.now(),
    draining: false,
    stopping: false,
    staged: 0,
  };
  const { changes } = worker;
  if (changes && settings.worker === 1) sweepNowAndThen(changes, settings);
  let listener: TCPSocketListener<Connection> | undefined;
  const stopNow = () => {
    listener?.stop();
    for (const session of worker.sessions) session.close();
    worker.root.close();
    process.exit(0);
  };
  ignoreSignals();
  process.on("message", (message: Order | Reply | ForWorker | StorageNews) => {
    if (message === "stop") return stopNow();
    if (message === "drain") return void drain(worker, listener, stopNow);
    if ("kind" in message && message.kind === "storage") return bucket?.hear(message.refusal);
    if ("kind" in message) return hub.onMessage(message);
    if ("reply" in message) return worker.gate.onReply(message);
    const { tokens, certificate } = message.secrets;
    worker.tokens = tokens && new Tokens(tokens);
    worker.certificate = certificate;
    if (listener) return;
    listener = startToListen(worker);
    process.send?.("ready");
  });
  // The supervisor is gone, however it ended.
  process.on("disconnect", stopNow);
}

/** What is served, and where changes go. */
function openStorage(
  settings: Settings,
  { versions: etags }: Hub,
): Pick<Worker, "root" | "changes"> & { bucket?: Bucket } {
  const { root, writable, maxUpload } = settings;
  if (settings.redirectOnly) return { root: noRoot(), changes: undefined };
  if (!isBucket(root)) {
    const changes = writable ? openChanges(root, { ...settings, etags }) : undefined;
    return { root: openFolder(root, etags), changes };
  }
  const say = (path: string | undefined, status: string) => log(settings, { event: "storage", status, path });
  const tellWhy = (path: string, status: ErrorCode, why: string) =>
    logRefusal(settings, { event: "storage", status, path, why });
  const tellRefusal = (refusal: Refusal | undefined) => process.send?.({ kind: "storage", refusal });
  const bucket = openBucket(root, { maxUpload, say, tellWhy, tellRefusal, cache: openCache(settings) });
  return { bucket, root: bucket.root, changes: writable ? openBucketChanges(bucket) : undefined };
}

/** A signal to the whole group comes here as well as to the supervisor: only what that then says counts. */
function ignoreSignals(): void {
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) process.on(signal, () => {});
}

function startToListen(worker: Worker): TCPSocketListener<Connection> {
  const { settings } = worker;
  const turnedAway = new Set<Connection>();
  return accept({
    host: settings.host,
    port: settings.port,
    maxLength: MAX_HELLO_BYTES,
    pool: uploadPool,
    timeoutMs: settings.idleMs,
    promptFrames: true,
    minRate: settings.minRate,
    certificate: settings.tls && (() => worker.certificate!),
    onConnection: (connection) => letIn(worker, connection, turnedAway).catch((error) => logBug(settings, error)),
  });
}

function sweepNowAndThen(changes: Changes, settings: Settings): void {
  const sweep = () => changes.sweep().catch((error) => logBug(settings, error));
  sweep();
  setInterval(sweep, SWEEP_MS).unref();
}

/** Serves a connection, if there is room for it, to its end. */
async function letIn(worker: Worker, connection: Connection, turnedAway: Set<Connection>): Promise<void> {
  const { settings, gate, sessions } = worker;
  const { peer } = connection;
  if (peer === "") return connection.close();
  if (sessions.size + worker.entering >= settings.maxOfWorker)
    return turnAway(settings, connection, "full", turnedAway);
  worker.entering++;
  const verdict = await gate.enter(peer);
  worker.entering--;
  if (verdict !== "welcome") return turnAway(settings, connection, verdict, turnedAway);
  const session = new Session(worker, connection);
  sessions.add(session);
  // It leaves by itself: nothing here stands by for as long as it lasts.
  session.run().catch((error) => logBug(settings, error));
  // The others were told while this one was waiting.
  if (worker.draining) session.drain();
}

/** Says `busy`; beyond a number of those who are still being told, closes without a word. */
async function turnAway(
  settings: Settings,
  connection: Connection,
  verdict: Exclude<Verdict, "welcome">,
  turnedAway: Set<Connection>,
): Promise<void> {
  const why = verdict === "full" ? "--max-connections" : "--max-per-address";
  logRefusal(settings, { status: "busy", peer: connection.peer, why });
  if (turnedAway.size >= MAX_TURNED_AWAY) return connection.close();
  turnedAway.add(connection);
  connection.timeoutMs = Math.min(TURN_AWAY_MS, settings.idleMs);
  const text = verdict === "full" ? undefined : "too many connections from your address";
  try {
    await connection.send(encodeError(new RepriseError("busy", text)));
    await connection.finish();
  } finally {
    turnedAway.delete(connection);
  }
}

async function drain(
  worker: Worker,
  listener: TCPSocketListener<Connection> | undefined,
  stopNow: () => void,
): Promise<void> {
  worker.draining = true;
  listener?.stop();
  for (const session of worker.sessions) session.drain();
  const none = () => worker.sessions.size + worker.entering === 0;
  await waitUntil(none, worker.settings.graceMs);
  worker.stopping = true;
  worker.hub.stop();
  await waitUntil(none, STOP_MS);
  stopNow();
}

/** Looks ten times a second, for at most `ms`. */
async function waitUntil(condition: () => boolean, ms: number): Promise<void> {
  const end = performance.now() + ms;
  while (!condition() && performance.now() < end) await Bun.sleep(Math.min(100, end - performance.now()));
}

function openCache(settings: Settings): Cache | undefined {
  const { cache, workers } = settings;
  const say = (problem: string) => log(settings, { event: "cache", status: problem });
  return cache && Cache.open(cache.folder, { maxBytes: cache.maxBytes, workers, say });
}

// ---------------------------------------------------------------------------------------------------- keeper

/** The keeper does all by itself, and says "ready"; but the supervisor may end while it is being loaded. */
async function keepUp(settings: KeeperSettings): Promise<void> {
  ignoreSignals();
  const stopNow = () => process.exit(0);
  const onMessage = (message: unknown) => message === "stop" && stopNow();
  process.on("message", onMessage);
  process.on("disconnect", stopNow);
  const { keep } = await import("./keeper.ts");
  void keep(settings);
  process.off("message", onMessage);
  process.off("disconnect", stopNow);
}

// ---------------------------------------------------------------------------------------------------- supervisor

/** What only the keeper has to know. */
type Membership = Pick<KeeperSettings, "join" | "cluster" | "advertise" | "token" | "ca">;

/** Starts the workers and keeps them going until a signal comes; resolves with the exit status. */
class Supervisor {
  readonly #settings: Omit<Settings, "worker">;
  #secrets: Secrets;
  readonly #workers = new Map<number, Subprocess>();
  readonly #done = Promise.withResolvers<number>();
  readonly #admission: Admission;
  readonly #keeper: KeeperHost;
  readonly #restarts = new Restarts();
  #stopping = false;
  #isReady = false;
  /** What the service manager was told last has been sent. */
  #told: Promise<void> | undefined;
  #failedStarts = 0;

  /** Throws as `readSecrets`. */
  constructor(settings: Omit<Settings, "worker">, membership: Membership) {
    this.#settings = settings;
    const { root, host, tls, keepFree, redirectOnly, log } = settings;
    this.#keeper = new KeeperHost(
      import.meta.path,
      () => ({ root, host, port: settings.port, tls: tls !== undefined, keepFree, redirectOnly, log, ...membership }),
      (worker, message) => this.#tellOf(worker, message),
    );
    this.#secrets = readSecrets(settings);
    this.#admission = new Admission(settings);
  }

  async run(): Promise<number> {
    const holder = holdPort(this.#settings.host, this.#settings.port);
    this.#settings.port = holder.port;
    for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => this.#stop(signal));
    process.on("SIGHUP", () => this.#reload());
    const numbers = Array.from({ length: this.#settings.workers }, (_, index) => index + 1);
    const started = numbers.map((number) => this.#start(number));
    const ready = await Promise.race([Promise.all(started), Bun.sleep(START_MS).then(() => [false])]);
    holder.stop(true);
    if (!this.#stopping && ready.every(Boolean)) {
      if (this.#settings.clustered) this.#keeper.start();
      await this.#announce();
    } else this.#giveUp("a worker did not start");
    const status = await this.#done.promise;
    await Promise.race([this.#told, Bun.sleep(STOP_MS)]);
    return status;
  }

  /** Starts a worker; resolves when it listens, with false if it ends before that. */
  #start(number: number): Promise<boolean> {
    const startedAt = performance.now();
    const { promise, resolve } = Promise.withResolvers<boolean>();
    let listened = false;
    const child = Bun.spawn({
      cmd: [process.execPath, import.meta.path],
      // What the service manager is told is told by the supervisor alone.
      env: {
        ...process.env,
        NOTIFY_SOCKET: undefined,
        REPRISE_WORKER: JSON.stringify({ ...this.#settings, worker: number }),
      },
      stdio: ["ignore", "inherit", "inherit"],
      ipc: (message: "ready" | Question | FromWorker | StorageNews, child) => {
        if (message !== "ready") return this.#answer(number, child, message);
        listened = true;
        resolve(true);
      },
      onExit: () => {
        resolve(false);
        this.#workers.delete(number);
        this.#admission.forget(number);
        this.#keeper.workerEnded(number);
        this.#onDeath(number, performance.now() - startedAt, listened);
      },
    });
    this.#workers.set(number, child);
    const { cluster } = this.#keeper;
    if (cluster) tell(child, { kind: "cluster", cluster });
    tell(child, { secrets: this.#secrets });
    if (this.#stopping) child.kill("SIGKILL");
    return promise;
  }

  #answer(number: number, child: Subprocess, question: Question | FromWorker | StorageNews): void {
    // What one that has ended still had to say is forgotten with it.
    if (this.#workers.get(number) !== child) return;
    if (question.kind === "storage") {
      this.#tellOthers(child, question);
      return;
    }
    if (question.kind === "next" || question.kind === "keeper") {
      this.#keeper.onWorker(number, question);
      return;
    }
    const reply = this.#admission.answer(number, question);
    if (reply) tell(child, reply);
  }

  #tellOthers(from: Subprocess, news: StorageNews): void {
    for (const child of this.#workers.values()) if (child !== from) tell(child, news);
  }

  /** Of the cluster: a worker, or all of them. */
  #tellOf(number: number, message: ForWorker): void {
    for (const [each, child] of this.#workers) if (number === 0 || number === each) tell(child, message);
  }

  /** Every worker takes them in between two connections: none is refused meanwhile, none is cut. */
  #reload(): void {
    // Each by itself: a certificate that is damaged must not keep a token alive that was removed.
    const { tokens, certificate } = this.#secrets;
    this.#secrets = {
      tokens: this.#readAgain("tokens", () => readTokensOf(this.#settings), tokens),
      certificate: this.#readAgain("certificate", () => readCertificateOf(this.#settings), certificate),
    };
    // Whoever has not yet been told that it is ready must not be told so by this.
    const isTold = this.#isReady && !this.#stopping;
    if (isTold) notifyReloading();
    for (const child of this.#workers.values()) tell(child, { secrets: this.#secrets });
    if (isTold) this.#told = notify("READY=1");
  }

  #readAgain<T>(path: string, read: () => T, before: T): T {
    const line = { event: "reload", path };
    const from = { ...this.#settings, worker: 0 };
    try {
      const now = read();
      if (now !== undefined) log(from, { ...line, status: "ok", count: Array.isArray(now) ? now.length : undefined });
      return now;
    } catch (error) {
      if (!(error instanceof RepriseError)) throw error;
      say("error", `${error.message}; what was read before stays in use`);
      log(from, { ...line, status: error.code });
      return before;
    }
  }

  async #onDeath(number: number, livedMs: number, listened: boolean): Promise<void> {
    if (this.#stopping) {
      if (this.#workers.size === 0) this.#finish();
      return;
    }
    this.#failedStarts = listened ? 0 : this.#failedStarts + 1;
    if (this.#failedStarts >= MAX_FAILED_STARTS) return this.#giveUp("workers do not come to listen");
    log({ ...this.#settings, worker: number }, { event: "worker", status: "restarted" });
    const delayMs = this.#restarts.delayAfter(livedMs);
    if (delayMs > 0) await Bun.sleep(delayMs);
    if (!this.#stopping) await this.#start(number);
  }

  #stop(signal: "SIGINT" | "SIGTERM"): void {
    const again = this.#stopping;
    this.#stopping = true;
    if (!again) this.#told = notify("STOPPING=1");
    const order: Order = signal === "SIGINT" || again ? "stop" : "drain";
    for (const child of this.#workers.values()) tell(child, order);
    this.#keeper.drain();
    if (this.#workers.size === 0) this.#finish();
    // A worker that hangs is not waited for.
    setTimeout(() => this.#kill(), order === "stop" ? STOP_MS : this.#settings.graceMs + 2 * STOP_MS);
  }

  /** The workers are gone, and needed the keeper until then. */
  async #finish(): Promise<void> {
    await this.#keeper.stop(STOP_MS);
    this.#done.resolve(0);
  }

  #giveUp(why: string): void {
    if (!this.#stopping) say("error", `${why}; the server stops`);
    const status = this.#stopping ? 0 : 1;
    this.#stop("SIGINT");
    this.#done.resolve(status);
  }

  #kill(): void {
    for (const child of this.#workers.values()) child.kill("SIGKILL");
    this.#keeper.kill();
    this.#done.resolve(0);
  }

  async #announce(): Promise<void> {
    const { host, port, root, tls } = this.#settings;
    await print(`listening ${tls ? "tls" : "tcp"}://${formatAddress(host, port)}`);
    if (!this.#stopping) this.#told = notify("READY=1");
    this.#isReady = true;
    say("info", `serving ${quote(root)}${whoMay(this.#settings)}`);
  }
}

/** Who can use the server, as far as that should surprise nobody. */
function whoMay({ host, tokens, tls, writable, anonymousWrite }: Omit<Settings, "worker">): string {
  if (host === "localhost" || isLoopback(host)) return " to this machine only; --host 0.0.0.0 opens it to others";
  if (tokens !== undefined) return tls ? "" : "; without --tls-cert no client sends its token from another machine";
  const may = writable && anonymousWrite ? "read and change" : "read";
  return `: everybody who can connect can ${may} it; --tokens says who may`;
}

/** A worker that can't be told any more is ended without. */
function tell(child: Subprocess, message: Order | Reply | ForWorker | StorageNews): void {
  try {
    child.send(message);
  } catch {
    child.kill("SIGKILL");
  }
}

/**
 * Makes sure that the port is free, and keeps it until the workers have it. Two listeners with reusePort would silently
 * share it, so the first try is made without. Throws `PortTaken`.
 */
function holdPort(hostname: string, port: number): TCPSocketListener<undefined> {
  const socket = { data() {}, open: (socket: { terminate(): void }) => socket.terminate() };
  try {
    const trial = Bun.listen({ hostname, port, socket });
    const found = trial.port;
    trial.stop(true);
    return listen({ hostname, port: found, reusePort: true, socket });
  } catch (error) {
    throw new PortTaken(hostname, port, error);
  }
}

class PortTaken extends Error {
  constructor(host: string, port: number, cause: unknown) {
    const code = (cause as NodeJS.ErrnoException).code;
    const where = formatAddress(host, port);
    const taken = `${where} is taken by another program; stop it or choose another --port`;
    super(code === "EADDRINUSE" ? taken : `cannot listen on ${where}: ${code ?? cause}`, { cause });
  }
}

// ---------------------------------------------------------------------------------------------------- main

export const main = command({
  meta: { name: "server.ts", version, description: "reprise server: gives away the files of a folder, and takes them" },
  args: {
    root: {
      type: "positional",
      required: false,
      default: "server_root",
      description: "The folder, or s3://BUCKET/PREFIX",
    },
    host: {
      type: "string",
      default: "127.0.0.1",
      valueHint: "address",
      description: "Where to listen; 0.0.0.0 is everywhere",
    },
    port: { type: "string", default: String(DEFAULT_PORT), valueHint: "port", description: "0 picks a free one" },
    workers: { type: "string", valueHint: "number", description: "Processes; one for each processor if not given" },
    writable: { type: "boolean", description: "Take uploads and other changes" },
    "anonymous-write": { type: "boolean", description: "From other machines too, without a token" },
    cache: { type: "string", valueHint: "folder", description: "With a bucket: keep what is read on this disk" },
    "cache-size": { type: "string", valueHint: "size", description: "What that may take of it; 10G if not given" },
    tokens: { type: "string", valueHint: "file", description: "Who may do what; see the command token" },
    "tls-cert": { type: "string", valueHint: "file", description: "Speak TLS: certificate and its chain, PEM" },
    "tls-key": { type: "string", valueHint: "file", description: "The certificate's key, PEM" },
    join: { type: "string", valueHint: "host:port", description: "Share the files of that server, and its clients" },
    cluster: {
      type: "string",
      valueHint: "etcd://host:port/name",
      description: "Share the files of all servers that name the same ledger",
    },
    "redirect-only": { type: "boolean", description: "With --cluster: have no files, only send clients on" },
    advertise: {
      type: "string",
      valueHint: "host:port",
      description: "Where clients reach this server, if not at --host",
    },
    "token-file": { type: "string", valueHint: "file", description: "For --join: a replica token (or REPRISE_TOKEN)" },
    ca: { type: "string", valueHint: "file", description: "PEM: trust these issuers of other servers (or REPRISE_CA)" },
    "max-connections": {
      type: "string",
      default: "4096",
      valueHint: "number",
      description: "Further clients are told to come back",
    },
    "max-per-address": {
      type: "string",
      default: "0",
      valueHint: "number",
      description: "The same for each address, 0 for no limit",
    },
    "idle-timeout": {
      type: "string",
      default: "60",
      valueHint: "seconds",
      description: "Closes a connection after this long without a byte",
    },
    "min-rate": {
      type: "string",
      default: "500",
      valueHint: "rate",
      description: "And one that is slower over that time; 0 for no limit",
    },
    grace: {
      type: "string",
      default: "10",
      valueHint: "seconds",
      description: "What SIGTERM leaves to running transfers",
    },
    "max-upload": { type: "string", valueHint: "size", description: "Of the largest file that is taken: 500K, 10G" },
    "keep-free": {
      type: "string",
      default: "64M",
      valueHint: "size",
      description: "What uploads leave free on the disk",
    },
    "max-list": {
      type: "string",
      default: "10000000",
      valueHint: "number",
      description: "Entries of one list",
    },
    "limit-rate": { type: "string", valueHint: "rate", description: "Bytes a second for one connection: 500K, 10M" },
    log: { type: "string", valueHint: "pretty|json", description: "pretty on a terminal, else json" },
  },
  subCommands: { token },
  async run({ args }) {
    const settings = settingsFrom(args as unknown as Args);
    const membership = await membershipFrom(args as unknown as Args);
    try {
      await checkRoot(settings, membership);
      if (membership.cluster !== undefined) await checkCluster(membership.cluster, settings);
      process.exitCode = await new Supervisor(settings, membership).run();
    } catch (error) {
      if (!(error instanceof PortTaken || error instanceof NotThere)) throw error;
      say("error", error.message);
      process.exitCode = 1;
    }
  },
});

/** What the server needs and is not its own: a bucket, a ledger. */
class NotThere extends Error {}

/** Throws where nothing can be served, or written if that is wanted. */
async function checkRoot(
  { root, writable, redirectOnly, cache }: Omit<Settings, "worker">,
  membership: Membership,
): Promise<void> {
  if (redirectOnly) return;
  if (cache) Cache.check(cache.folder);
  if (isBucket(root)) return needed(() => openBucket(root).check(writable));
  openFolder(root).close();
  const { join, cluster } = membership;
  const option = join !== undefined ? "--join" : cluster !== undefined ? "--cluster" : "--writable";
  if (writable || option !== "--writable") checkWritable(root, option);
}

/** Whether the ledger can be asked, and is for servers like this one. Throws `NotThere`. */
async function checkCluster(cluster: string, { root, redirectOnly }: Omit<Settings, "worker">): Promise<void> {
  const { checkLedger } = await import("./quorum.ts");
  const store = redirectOnly ? undefined : storeOf(root);
  if (store === FOLDER_STORE) await checkSameCluster(cluster, root);
  await needed(() => checkLedger(cluster, store));
}

/** A name that was mistyped must not make one tree of two. */
async function checkSameCluster(cluster: string, root: string): Promise<void> {
  const [{ IndexReader }, { parseCluster }] = await Promise.all([import("./index.ts"), import("./etcd.ts")]);
  const index = IndexReader.open(`${root}/${INDEX}`);
  const before = index?.cluster;
  index?.close();
  const { name } = parseCluster(cluster);
  if (before === undefined || before === name) return;
  const advice = `to make its files part of ${quote(name)}, too, remove the .reprise in it`;
  throw new NotThere(`${quote(root)} is of the cluster ${quote(before)}; ${advice}`);
}

async function needed(work: () => Promise<void>): Promise<void> {
  try {
    await work();
  } catch (error) {
    if (error instanceof RepriseError && error.code === "usage") throw error;
    throw new NotThere(error instanceof Error ? error.message : String(error), { cause: error });
  }
}

function checkWritable(root: string, option: string): void {
  try {
    openChanges(root).close();
  } catch (error) {
    const why = (error as NodeJS.ErrnoException).code ?? String(error);
    const what = `${quote(root)} cannot be written (${why}); start without ${option} to only serve it`;
    throw new RepriseError("refused", what, error);
  }
}

function settingsFrom(args: Args): Omit<Settings, "worker"> {
  // Where the kernel does not spread connections over listeners, one of them would get all.
  const most = process.platform === "linux" ? 1024 : 1;
  const workers =
    args.workers === undefined
      ? Math.min(most, availableParallelism())
      : numberOption(args, "workers", { min: 1, max: most });
  const log = args.log ?? (isTerminal(2) ? "pretty" : "json");
  if (log !== "pretty" && log !== "json") throw usage(`--log takes pretty or json, not ${quote(String(log))}`);
  return {
    workers,
    root: String(args.root),
    clustered: args.join !== undefined || args.cluster !== undefined || hasLedger(String(args.root)),
    redirectOnly: redirectOnlyOf(args),
    host: String(args.host),
    port: numberOption(args, "port", { min: 0, max: 65_535 }),
    ...connectionsOf(args, workers),
    cache: cacheFrom(args),
    maxPerAddress: numberOption(args, "max-per-address", { min: 0, max: 1_000_000 }),
    idleMs: secondsOption(args, "idle-timeout"),
    minRate: sizeOption(args, "min-rate", 0)!,
    graceMs: secondsOption(args, "grace"),
    limitRate: sizeOption(args, "limit-rate"),
    maxUpload: sizeOption(args, "max-upload"),
    keepFree: sizeOption(args, "keep-free", 0)!,
    maxList: numberOption(args, "max-list", { min: 1, max: Number.MAX_SAFE_INTEGER }),
    ...accessFrom(args),
    log,
  };
}

function hasLedger(root: string): boolean {
  return !isBucket(root) && existsSync(`${root}/${LEDGER}`);
}

function redirectOnlyOf(args: Args): boolean {
  const isOnly = args["redirect-only"] === true;
  if (isOnly && args.cluster === undefined) throw usage("--redirect-only needs --cluster");
  if (isOnly && args.writable === true) throw usage("--redirect-only and --writable exclude each other");
  return isOnly;
}

function cacheFrom(args: Args): Settings["cache"] {
  const folder = args.cache as string | undefined;
  if (folder === undefined && args["cache-size"] !== undefined) throw usage("--cache-size is for --cache");
  if (folder === undefined) return undefined;
  if (!isBucket(String(args.root))) throw usage("--cache is for a bucket: the files of a folder are on disk already");
  if (folder === "") throw usage("--cache takes a folder");
  const maxBytes = sizeOption(args, "cache-size") ?? CACHE_BYTES;
  if (maxBytes < MIN_CACHE_BYTES) throw usage("--cache-size takes 64M or more");
  return { folder, maxBytes };
}

function accessFrom(args: Args): Pick<Settings, "writable" | "anonymousWrite" | "tokens" | "tls"> {
  const file = (name: string) => args[name] as string | undefined;
  const [tokens, cert, key] = [file("tokens"), file("tls-cert"), file("tls-key")];
  const writable = args.writable === true;
  const anonymousWrite = args["anonymous-write"] === true;
  if ((cert === undefined) !== (key === undefined)) throw usage("--tls-cert and --tls-key go together");
  if (anonymousWrite && tokens !== undefined) throw usage("--anonymous-write and --tokens exclude each other");
  if (anonymousWrite && !writable) throw usage("--anonymous-write needs --writable");
  return { writable, anonymousWrite, tokens, tls: cert && key ? { cert, key } : undefined };
}

/** What is said of a cluster. The client's part that reads it is loaded where it is needed, and by no worker. */
async function membershipFrom(args: Args): Promise<Membership> {
  const { join, cluster, advertise } = args as { join?: string; cluster?: string; advertise?: string };
  if (join !== undefined && cluster !== undefined) throw usage("--join and --cluster exclude each other");
  if (join === undefined && args["token-file"] !== undefined) throw usage("--token-file is for --join");
  const { credentialsOf } = await import("./context.ts");
  // Without a server to join, a token in the environment is somebody else's.
  const { token, ca } = join === undefined && !args.ca && !process.env.REPRISE_CA ? {} : credentialsOf(args);
  return {
    join: join === undefined ? undefined : await serverToJoin(join),
    cluster: cluster === undefined ? undefined : await checkedCluster(cluster, args),
    advertise: advertise === undefined ? undefined : checkAdvertised(advertise),
    token: join === undefined ? undefined : token,
    ca,
  };
}

async function serverToJoin(text: string): Promise<string> {
  const { parseServers } = await import("./remote.ts");
  const wrong = usage(`--join takes host:port, not ${quote(text)}`);
  try {
    const [server, ...others] = parseServers(text);
    if (!server || others.length > 0 || isEverywhere(server.host)) throw wrong;
    return `${server.tls ? "tls://" : ""}${formatAddress(server.host, server.port)}`;
  } catch {
    throw wrong;
  }
}

/** Members tell each other where clients reach them. */
async function checkedCluster(text: string, { host, advertise }: Args): Promise<string> {
  const { parseCluster } = await import("./etcd.ts");
  parseCluster(text);
  if (advertise === undefined && isEverywhere(String(host)))
    throw usage("--cluster with --host 0.0.0.0 needs --advertise host:port, where clients reach this server");
  return text;
}

/** Clients are sent there, and so it is an address, and whole. */
function checkAdvertised(text: string): string {
  const address = addressOf(text);
  if (!address) throw usage(`--advertise takes host:port, not ${quote(text)}`);
  if (isEverywhere(address.host))
    throw usage(`--advertise takes an address that clients can connect to, not ${quote(text)}`);
  return formatAddress(address.host, address.port);
}
/** As many connections as are asked for, and no more than there are descriptors for. */
function connectionsOf(args: Args, workers: number): Pick<Settings, "maxConnections" | "maxOfWorker"> {
  const wanted = numberOption(args, "max-connections", { min: 1, max: 1_000_000 });
  const limit = Number(/Max open files\s+(\d+)/.exec(readFileSync("/proc/self/limits", "utf8"))?.[1] ?? 1024);
  const ofCache = args.cache === undefined ? 0 : CACHE_DESCRIPTORS;
  const own = OWN_DESCRIPTORS + ofCache + (args.writable === true ? STAGED_DESCRIPTORS : 0);
  const each = DESCRIPTORS_EACH + (args.writable === true ? FOLDERS_EACH : 0);
  const maxOfWorker = Math.max(1, Math.floor((limit - own) / each));
  const maxConnections = Math.min(wanted, maxOfWorker * workers);
  if (maxConnections < wanted)
    say(
      "warn",
      `${wanted} connections need more than the ${limit} open files allowed (ulimit -n): taking ${maxConnections}`,
    );
  return { maxConnections, maxOfWorker };
}

if (import.meta.main) {
  const { REPRISE_WORKER: worker, REPRISE_KEEPER: keeper } = process.env;
  if (worker) work(JSON.parse(worker));
  else if (keeper) await keepUp(JSON.parse(keeper));
  else await runScript(main);
}
