#!/usr/bin/env bun
/**
 * The reprise server: gives away the files of a folder, over one TCP port, to any number of clients.
 *
 * ```sh
 * bun server.ts                                # server_root/ on 127.0.0.1:2121
 * bun server.ts /srv/files --host 0.0.0.0      # another folder, to everyone who can reach this machine
 * bun server.ts --port 0 --workers 2           # a free port, named in the first line on stdout
 * ```
 *
 * The process that is started touches no client. It is the supervisor: it finds the port, starts the workers, which all
 * listen on it (the kernel spreads the connections), starts a worker again that dies, and hands signals on. A worker
 * runs one `Session` for each connection: a loop that takes a request, answers it, and takes the next. No session holds
 * more of a file than a chunk, and none goes on before the kernel has taken what it sent.
 */
import { readFileSync, writeSync } from "node:fs";
import { availableParallelism } from "node:os";
import type { Subprocess, TCPSocketListener } from "bun";
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
import { Connection, formatAddress, listen, Pace } from "./connection.ts";
import { version } from "./package.json";
import {
  DEFAULT_PORT,
  decodeHello,
  decodeRequest,
  EntriesEncoder,
  ERRORS,
  encodeDataHeader,
  encodeEnd,
  encodeError,
  encodeInfo,
  encodeMeta,
  encodeWelcome,
  type Frame,
  MAX_CONTENT_BYTES,
  MAX_REQUEST_BYTES,
  PROTOCOL_VERSION,
  quote,
  RepriseError,
  type Request,
  toJson,
} from "./protocol.ts";
import { type OpenFile, openFolder, type Root } from "./storage.ts";

const SOFTWARE = `reprise ${version}`;
/** Content of a DATA frame where it passes through our memory, which a thousand slow readers then share. */
const COPIED_CHUNK_BYTES = 64 * 1024;
/** Below this, copying costs less than the calls that avoid it, and several answers travel in one packet. */
const MIN_SENDFILE_BYTES = 64 * 1024;
/** Chunks start small, and grow or shrink until one takes the connection about this long. */
const FIRST_CHUNK_BYTES = 64 * 1024;
const SHORT_CHUNK_MS = 5;
const LONG_CHUNK_MS = 100;
/** At a limited rate, so many chunks a second. */
const PACED_CHUNKS = 8;
/** The wait before a worker that lived shorter than this is started again: none at first, then this, doubled each time. */
const YOUNG_MS = 1_000;
const FIRST_RESTART_MS = 50;
const LAST_RESTART_MS = 1_000;
/** After so many in a row that did not come to listen, the supervisor gives up. */
const MAX_FAILED_STARTS = 5;
/** How long all workers together may take to listen. */
const START_MS = 20_000;
/** Connections over the limit that are told so at the same time. */
const MAX_TURNED_AWAY = 64;
/** Descriptors that a worker needs for itself, and for those that it turns away. */
const OWN_DESCRIPTORS = 64 + MAX_TURNED_AWAY;
/** How long a stopping process waits for what it has told to end. */
const STOP_MS = 800;

/** What a worker is told by the supervisor, as JSON in the environment variable REPRISE_WORKER. */
interface Settings {
  worker: number;
  workers: number;
  root: string;
  host: string;
  port: number;
  /** Of this worker. */
  maxConnections: number;
  idleMs: number;
  graceMs: number;
  /** Bytes a second for one connection. */
  limitRate?: number | undefined;
  log: LogFormat;
}
type LogFormat = "pretty" | "json";
/** From the supervisor to a worker: end when what runs has ended, or end now. */
type Order = "drain" | "stop";

// ---------------------------------------------------------------------------------------------------- session

/** What the sessions of one worker share. */
interface Worker {
  readonly settings: Settings;
  readonly root: Root;
  readonly sessions: Set<Session>;
  readonly startedAt: number;
  /** SIGTERM came: what runs may end, nothing new begins. */
  draining: boolean;
  /** The grace is over: transfers end at the next chunk. */
  stopping: boolean;
}

/** One connection, from HELLO to its end. */
class Session {
  readonly #worker: Worker;
  readonly #connection: Connection;
  readonly #pace: Pace | undefined;
  readonly #peer: string;
  #state: "greeting" | "waiting" | "answering" | "ending" = "greeting";
  /** Content sent for the current request, for the log. */
  #bytes = 0;

  constructor(worker: Worker, connection: Connection) {
    this.#worker = worker;
    this.#connection = connection;
    this.#peer = connection.peer;
    this.#pace = worker.settings.limitRate ? new Pace(worker.settings.limitRate) : undefined;
  }

  async run(): Promise<void> {
    try {
      await this.#serve();
      await this.#end();
    } catch (error) {
      await this.#refuse(error);
    }
  }

  /** SIGTERM: a session between two requests ends, another when its answer is done. */
  drain(): void {
    if (this.#state === "waiting" || this.#state === "greeting")
      this.#connection.fail(new RepriseError("shutting_down"));
  }

  close(): void {
    this.#connection.close();
  }

  async #serve(): Promise<void> {
    const hello = await this.#next();
    if (!hello) return;
    await this.#greet(hello);
    for (;;) {
      this.#state = "waiting";
      const frame = await this.#next();
      if (!frame) return;
      const request = decodeRequest(frame);
      this.#state = "answering";
      await this.#answer(request);
      if (request.action === "quit") return;
      if (this.#worker.draining) throw new RepriseError("shutting_down");
    }
  }

  async #next(): Promise<Frame | undefined> {
    try {
      return await this.#connection.next();
    } catch (error) {
      if (!(error instanceof RepriseError)) throw error;
      if (error.code === "timeout") throw new RepriseError("idle");
      // Before HELLO a wrong checksum only tells that this is another protocol.
      if (error.code === "checksum" && this.#state === "greeting") throw new RepriseError("bad_frame");
      throw error;
    }
  }

  async #greet(frame: Frame): Promise<void> {
    const hello = decodeHello(frame);
    if (hello.version !== PROTOCOL_VERSION) {
      const text = `protocol version ${hello.version} is not spoken here, only ${PROTOCOL_VERSION}`;
      this.#state = "waiting";
      throw new RepriseError("version", text);
    }
    await this.#connection.send(encodeWelcome(SOFTWARE));
  }

  /** One request, its answer and its line in the log. What is wrong with a request is an answer too. */
  async #answer(request: Request): Promise<void> {
    const startedAt = performance.now();
    const path = "path" in request ? request.path : undefined;
    const offset = "offset" in request ? request.offset : undefined;
    this.#bytes = 0;
    let status = "ok";
    try {
      await this.#perform(request);
    } catch (error) {
      status = error instanceof RepriseError ? error.code : "failed";
      if (!(error instanceof RepriseError)) logBug(this.#worker.settings, error);
      if (isOver(error)) throw error;
      await this.#connection.send(encodeError(asReprise(error)));
    } finally {
      const ms = Math.round(performance.now() - startedAt);
      this.#log({ event: request.action, path, offset, bytes: this.#bytes, ms, status });
    }
  }

  async #perform(request: Request): Promise<void> {
    switch (request.action) {
      case "get":
        return this.#get(request);
      case "list":
        return this.#list(request.path, request.recursive);
      case "stat":
        return this.#connection.send(encodeMeta(await this.#worker.root.stat(request.path)));
      case "status":
        return this.#connection.send(encodeInfo(describe(this.#worker)));
      case "quit":
        return this.#connection.send(encodeEnd(0));
    }
  }

  async #get({ path, offset, length, etag }: Extract<Request, { action: "get" }>): Promise<void> {
    const file = await this.#worker.root.open(path);
    try {
      const { meta } = file;
      if (etag !== "" && etag !== meta.etag) throw new RepriseError("changed", `changed on the server: ${quote(path)}`);
      if (offset > meta.size)
        throw new RepriseError("bad_range", `${quote(path)} has no byte ${offset}, only ${meta.size}`);
      await this.#connection.send(encodeMeta(meta, offset));
      await this.#sendContent(file, offset, Math.min(meta.size, offset + length));
      file.verify();
      await this.#connection.send(encodeEnd(this.#bytes));
    } finally {
      file.close();
    }
  }

  async #sendContent(file: OpenFile, from: number, end: number): Promise<void> {
    const most = this.#mostChunkBytes();
    let size = Math.min(FIRST_CHUNK_BYTES, most);
    for (let at = from; at < end; ) {
      if (this.#worker.stopping) throw new RepriseError("shutting_down");
      const startedAt = performance.now();
      // Up to the next multiple: so the pieces are the same for everyone, and their checksums are kept.
      const length = Math.min(end - at, size - (at % size));
      await this.#sendChunk(file, at, length);
      at += length;
      this.#bytes += length;
      if (this.#pace) await this.#connection.flush();
      const ms = performance.now() - startedAt;
      if (ms < SHORT_CHUNK_MS) size = Math.min(size * 2, most);
      else if (ms > LONG_CHUNK_MS) size = Math.max(Math.floor(size / 2), Math.min(FIRST_CHUNK_BYTES, most));
      await this.#pace?.take(length);
    }
  }

  #mostChunkBytes(): number {
    const most = this.#connection.canSendFile ? MAX_CONTENT_BYTES : COPIED_CHUNK_BYTES;
    if (!this.#pace) return most;
    return Math.max(1, Math.min(most, Math.floor(this.#pace.rate / PACED_CHUNKS)));
  }

  async #sendChunk(file: OpenFile, offset: number, length: number): Promise<void> {
    const { fd } = file;
    if (fd === undefined || !this.#connection.canSendFile || length < MIN_SENDFILE_BYTES) {
      const content = await file.read(offset, length);
      await this.#connection.send(encodeDataHeader(length, Bun.hash.crc32(content)));
      return this.#connection.send(content);
    }
    await this.#connection.send(encodeDataHeader(length, await file.checksum(offset, length)));
    try {
      await this.#connection.sendFile(fd, offset, length);
    } catch (error) {
      // The frame is cut: no further frame could be told from its content.
      this.#connection.close();
      throw error;
    }
  }

  async #list(path: string, recursive: boolean): Promise<void> {
    const frames = new EntriesEncoder();
    let count = 0;
    for await (const entries of this.#worker.root.list(path, recursive)) {
      if (this.#worker.stopping) throw new RepriseError("shutting_down");
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

  #send(frame: Uint8Array): Promise<void> {
    this.#bytes += frame.length;
    return this.#connection.send(frame);
  }

  /** Ends the connection over an error: says it where that can be understood, and logs what no request accounts for. */
  async #refuse(error: unknown): Promise<void> {
    const { code } = asReprise(error);
    if (!(error instanceof RepriseError)) logBug(this.#worker.settings, error);
    const understands = this.#state !== "greeting" && ERRORS[code].closes && code !== "lost" && code !== "timeout";
    if (this.#state !== "answering" && code !== "lost") this.#log({ event: "close", status: code });
    if (understands) {
      await this.#connection.send(encodeError(asReprise(error))).catch(() => {});
      await this.#end();
    } else this.#connection.close();
  }

  async #end(): Promise<void> {
    this.#state = "ending";
    await this.#connection.finish();
  }

  #log(fields: LogFields): void {
    log(this.#worker.settings, { ...fields, peer: this.#peer });
  }
}

/** Whether an error leaves no connection to answer on. */
function isOver(error: unknown): boolean {
  return error instanceof RepriseError && ERRORS[error.code].closes;
}

function asReprise(error: unknown): RepriseError {
  return error instanceof RepriseError
    ? error
    : new RepriseError("failed", "the server failed; its log says more", error);
}

/** [status] */
function describe({ settings, sessions, startedAt }: Worker): Record<string, unknown> {
  return {
    server: SOFTWARE,
    protocol: PROTOCOL_VERSION,
    workers: settings.workers,
    worker: settings.worker,
    connections: sessions.size,
    uptime: Math.round((Date.now() - startedAt) / 1000),
    replicas: [],
  };
}

// ---------------------------------------------------------------------------------------------------- worker

/** Listens and serves until a signal comes or the supervisor is gone. */
function work(settings: Settings): void {
  const root = openFolder(settings.root);
  const sessions = new Set<Session>();
  const turnedAway = new Set<Connection>();
  const worker: Worker = { settings, root, sessions, startedAt: Date.now(), draining: false, stopping: false };
  const { host: hostname, port, idleMs } = settings;
  const listener = listen<Connection>({
    hostname,
    port,
    reusePort: true,
    socket: {
      ...Connection.handlers,
      open(socket) {
        const connection = new Connection(socket, {
          maxLength: MAX_REQUEST_BYTES,
          timeoutMs: idleMs,
          promptFrames: true,
        });
        if (sessions.size >= settings.maxConnections) return turnAway(settings, connection, turnedAway);
        const session = new Session(worker, connection);
        sessions.add(session);
        session.run().finally(() => sessions.delete(session));
      },
    },
  });

  const stopNow = () => {
    listener.stop();
    for (const session of sessions) session.close();
    root.close();
    process.exit(0);
  };
  // A signal to the whole group comes here as well as to the supervisor: only what it then says counts.
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => {});
  process.on("message", (order: Order) => (order === "stop" ? stopNow() : drain(worker, listener, stopNow)));
  // The supervisor is gone, however it ended.
  process.on("disconnect", stopNow);
  process.send?.("ready");
}

/** Says `busy`; beyond a number of those who are still being told, closes without a word. */
async function turnAway(settings: Settings, connection: Connection, turnedAway: Set<Connection>): Promise<void> {
  log(settings, { event: "close", status: "busy", peer: connection.peer });
  if (turnedAway.size >= MAX_TURNED_AWAY) return connection.close();
  turnedAway.add(connection);
  await connection.send(encodeError(new RepriseError("busy")));
  await connection.finish();
  turnedAway.delete(connection);
}

async function drain(worker: Worker, listener: TCPSocketListener<Connection>, stopNow: () => void): Promise<void> {
  worker.draining = true;
  listener.stop();
  for (const session of worker.sessions) session.drain();
  const none = () => worker.sessions.size === 0;
  await waitUntil(none, worker.settings.graceMs);
  worker.stopping = true;
  await waitUntil(none, STOP_MS);
  stopNow();
}

/** Looks ten times a second, for at most `ms`. */
async function waitUntil(condition: () => boolean, ms: number): Promise<void> {
  const end = performance.now() + ms;
  while (!condition() && performance.now() < end) await Bun.sleep(Math.min(100, end - performance.now()));
}

// ---------------------------------------------------------------------------------------------------- log

interface LogFields {
  event: string;
  status: string;
  peer?: string | undefined;
  path?: string | undefined;
  offset?: number | undefined;
  bytes?: number | undefined;
  ms?: number | undefined;
}

/** One line on stderr. These fields are a contract: `time event peer worker path offset bytes ms status`. */
function log(settings: Pick<Settings, "log" | "worker">, fields: LogFields): void {
  const { event, peer, path, offset, bytes, ms, status } = fields;
  const { worker } = settings;
  if (settings.log === "json") {
    const time = new Date().toISOString();
    writeLine(toJson({ time, event, peer, worker, path, offset, bytes, ms, status }));
    return;
  }
  const what = path === undefined ? event : `${event} ${quote(path)}`;
  const figures = bytes === undefined ? "" : ` from ${offset ?? 0}: ${bytes} bytes in ${ms} ms`;
  say("info", `${new Date().toLocaleTimeString("en-GB")} [${worker}] ${peer ?? "-"} ${what}${figures}, ${status}`);
}

/** A line is one write, so that the lines of several workers do not mix. A log that is full loses lines, not clients. */
function writeLine(line: string): void {
  try {
    writeSync(2, `${line}\n`);
  } catch {
    // Nobody is left to be told that the log cannot be written.
  }
}

function logBug(settings: Settings, error: unknown): void {
  const stack = error instanceof Error ? (error.stack ?? error.message) : String(error);
  if (settings.log === "json") {
    writeLine(
      toJson({
        time: new Date().toISOString(),
        event: "bug",
        worker: settings.worker,
        status: "failed",
        stack,
      }),
    );
  } else say("error", `[${settings.worker}] internal error, please report it: ${stack}`);
}

// ---------------------------------------------------------------------------------------------------- supervisor

/** Starts the workers and keeps them going until a signal comes; resolves with the exit status. */
class Supervisor {
  readonly #settings: Omit<Settings, "worker">;
  readonly #workers = new Map<number, Subprocess>();
  readonly #done = Promise.withResolvers<number>();
  #stopping = false;
  #youngDeaths = 0;
  #failedStarts = 0;

  constructor(settings: Omit<Settings, "worker">) {
    this.#settings = settings;
  }

  async run(): Promise<number> {
    const holder = holdPort(this.#settings.host, this.#settings.port);
    this.#settings.port = holder.port;
    for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => this.#stop(signal));
    const numbers = Array.from({ length: this.#settings.workers }, (_, index) => index + 1);
    const started = numbers.map((number) => this.#start(number));
    const ready = await Promise.race([Promise.all(started), Bun.sleep(START_MS).then(() => [false])]);
    holder.stop(true);
    if (!this.#stopping && ready.every(Boolean)) await this.#announce();
    else this.#giveUp("a worker did not start");
    return this.#done.promise;
  }

  /** Starts a worker; resolves when it listens, with false if it ends before that. */
  #start(number: number): Promise<boolean> {
    const startedAt = performance.now();
    const { promise, resolve } = Promise.withResolvers<boolean>();
    let listened = false;
    const child = Bun.spawn({
      cmd: [process.execPath, import.meta.path],
      env: { ...process.env, REPRISE_WORKER: JSON.stringify({ ...this.#settings, worker: number }) },
      stdio: ["ignore", "inherit", "inherit"],
      ipc: () => {
        listened = true;
        resolve(true);
      },
      onExit: () => {
        resolve(false);
        this.#workers.delete(number);
        this.#onDeath(number, performance.now() - startedAt, listened);
      },
    });
    this.#workers.set(number, child);
    if (this.#stopping) child.kill("SIGKILL");
    return promise;
  }

  async #onDeath(number: number, livedMs: number, listened: boolean): Promise<void> {
    if (this.#stopping) {
      if (this.#workers.size === 0) this.#done.resolve(0);
      return;
    }
    this.#failedStarts = listened ? 0 : this.#failedStarts + 1;
    if (this.#failedStarts >= MAX_FAILED_STARTS) return this.#giveUp("workers do not come to listen");
    log({ ...this.#settings, worker: number }, { event: "worker", status: "restarted" });
    this.#youngDeaths = livedMs < YOUNG_MS ? this.#youngDeaths + 1 : 0;
    if (this.#youngDeaths > 1) await Bun.sleep(Math.min(LAST_RESTART_MS, FIRST_RESTART_MS * 2 ** this.#youngDeaths));
    if (!this.#stopping) await this.#start(number);
  }

  #stop(signal: "SIGINT" | "SIGTERM"): void {
    const again = this.#stopping;
    this.#stopping = true;
    const order: Order = signal === "SIGINT" || again ? "stop" : "drain";
    for (const child of this.#workers.values()) tell(child, order);
    if (this.#workers.size === 0) this.#done.resolve(0);
    // A worker that hangs is not waited for.
    setTimeout(() => this.#kill(), order === "stop" ? STOP_MS : this.#settings.graceMs + 2 * STOP_MS);
  }

  #giveUp(why: string): void {
    if (!this.#stopping) say("error", `${why}; the server stops`);
    const status = this.#stopping ? 0 : 1;
    this.#stop("SIGINT");
    this.#done.resolve(status);
  }

  #kill(): void {
    for (const child of this.#workers.values()) child.kill("SIGKILL");
    this.#done.resolve(0);
  }

  async #announce(): Promise<void> {
    const { host, port, root } = this.#settings;
    await print(`listening tcp://${formatAddress(host, port)}`);
    const onlyHere = /^(127\.|::1$|localhost$)/.test(host);
    say("info", `serving ${quote(root)}${onlyHere ? " to this machine only; --host 0.0.0.0 opens it to others" : ""}`);
  }
}

/** A worker that can't be told any more is ended without. */
function tell(child: Subprocess, order: Order): void {
  try {
    child.send(order);
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
  meta: { name: "server.ts", version, description: "reprise server: gives away the files of a folder" },
  args: {
    root: { type: "positional", required: false, default: "server_root", description: "The folder" },
    host: {
      type: "string",
      default: "127.0.0.1",
      valueHint: "address",
      description: "Where to listen; 0.0.0.0 is everywhere",
    },
    port: { type: "string", default: String(DEFAULT_PORT), valueHint: "port", description: "0 picks a free one" },
    workers: { type: "string", valueHint: "number", description: "Processes; one for each processor if not given" },
    "max-connections": {
      type: "string",
      default: "4096",
      valueHint: "number",
      description: "Further clients are told to come back",
    },
    "idle-timeout": {
      type: "string",
      default: "60",
      valueHint: "seconds",
      description: "Closes a connection after this long without a byte",
    },
    grace: {
      type: "string",
      default: "10",
      valueHint: "seconds",
      description: "What SIGTERM leaves to running transfers",
    },
    "limit-rate": { type: "string", valueHint: "rate", description: "Bytes a second for one connection: 500K, 10M" },
    log: { type: "string", valueHint: "pretty|json", description: "pretty on a terminal, else json" },
  },
  async run({ args }) {
    const settings = settingsFrom(args as unknown as Args);
    openFolder(settings.root).close();
    try {
      process.exitCode = await new Supervisor(settings).run();
    } catch (error) {
      if (!(error instanceof PortTaken)) throw error;
      say("error", error.message);
      process.exitCode = 1;
    }
  },
});

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
    host: String(args.host),
    port: numberOption(args, "port", { min: 0, max: 65_535 }),
    maxConnections: connectionsOf(numberOption(args, "max-connections", { min: 1, max: 1_000_000 }), workers),
    idleMs: secondsOption(args, "idle-timeout"),
    graceMs: secondsOption(args, "grace"),
    limitRate: sizeOption(args, "limit-rate"),
    log,
  };
}

/** A worker's share of the connections, and no more than it has descriptors for: a socket and a file each. */
function connectionsOf(wanted: number, workers: number): number {
  const share = Math.ceil(wanted / workers);
  const limit = Number(/Max open files\s+(\d+)/.exec(readFileSync("/proc/self/limits", "utf8"))?.[1] ?? 1024);
  const most = Math.max(1, Math.floor((limit - OWN_DESCRIPTORS) / 2));
  if (share <= most) return share;
  say(
    "warn",
    `${wanted} connections need more than the ${limit} open files allowed (ulimit -n): taking ${most * workers}`,
  );
  return most;
}

if (import.meta.main) {
  const worker = process.env.REPRISE_WORKER;
  if (worker) work(JSON.parse(worker));
  else await runScript(main);
}
