#!/usr/bin/env bun
/**
 * The reprise client: gets files from a reprise server, whole, through any interruption.
 *
 * ```sh
 * bun client.ts get photo.png                  # into client_root/
 * bun client.ts get photo.png -o /tmp/p.png    # or anywhere
 * bun client.ts cat notes.txt | wc             # or into a pipe
 * bun client.ts ls --server 192.0.2.7:2121
 * bun client.ts                                # resumes what was interrupted, then prompts
 * ```
 *
 * As a library, `Remote` is a server that may come and go: each call connects when it must, is tried again when the
 * connection is lost, and follows the server's redirects. A download goes to a `Target`, which remembers how much it
 * holds of which version; after any failure the transfer goes on at the first byte that the target does not hold.
 */
import { closeSync, constants, openSync, type Stats, statSync, unlinkSync } from "node:fs";
import { basename, join } from "node:path";
import {
  type Args,
  command,
  formatSize,
  isTerminal,
  numberOption,
  print,
  printable,
  report,
  runScript,
  runWords,
  say,
  secondsOption,
  setQuiet,
  showsProgress,
  sizeOption,
  usage,
} from "./command.ts";
import { type Connection, type ConnectOptions, connect, formatAddress, Pace, sleep } from "./connection.ts";
import { version } from "./package.json";
import {
  type Answer,
  BufferPool,
  DEFAULT_PORT,
  decodeAnswer,
  type Entry,
  ERRORS,
  encodeHello,
  encodeRequest,
  HEADER_BYTES,
  MAX_ANSWER_BYTES,
  type Meta,
  quote,
  RepriseError,
  type Request,
  splitPath,
  TO_THE_END,
} from "./protocol.ts";
import { asLocal, LOG_SUFFIX, PART_SUFFIX, PartFile, readLog, StreamTarget, type Target } from "./resume.ts";

const MAX_REDIRECTS = 5;
/** The first wait before trying again; each further one is twice as long, up to the last, with jitter. */
const FIRST_RETRY_MS = 200;
const LAST_RETRY_MS = 10_000;
/** At a limited rate, one request asks for what this long brings. */
const STRETCH_MS = 5_000;
/** How long an interrupted client may take to save its log before it is ended all the same. */
const INTERRUPT_MS = 1_000;

export interface Address {
  host: string;
  port: number;
}

export interface RemoteOptions {
  /** Tried in turn. */
  servers: Address[];
  /** Every wait for the server ends after this long without a byte. */
  timeoutMs?: number;
  /** Attempts after the first, counted anew once bytes have arrived. */
  retries?: number;
  /** Bytes a second. */
  limitRate?: number | undefined;
  /** Aborting ends any call with the signal's reason. */
  signal?: AbortSignal | undefined;
  /** Told of what does not end a call: another attempt, another start. */
  note?: (text: string) => void;
}

export interface DownloadHooks {
  /** The version that comes; it starts at `offset`. */
  begin?(meta: Meta, offset: number): void;
  /** So many bytes are checked now, from the file's start. */
  progress?(bytes: number): void;
}

// ---------------------------------------------------------------------------------------------------- library

/** A server, or several that hold the same, as an object with the protocol's actions for methods. */
export class Remote {
  readonly #options: Required<Omit<RemoteOptions, "limitRate" | "signal">>;
  readonly #signal: AbortSignal | undefined;
  readonly #pace: Pace | undefined;
  readonly #connecting: Omit<ConnectOptions, "host" | "port">;
  readonly #free: (content: Uint8Array) => void;
  #peer: Peer | undefined;
  #turn = 0;

  constructor(options: RemoteOptions) {
    this.#options = { timeoutMs: 30_000, retries: 10, note: () => {}, ...options };
    this.#signal = options.signal;
    this.#pace = options.limitRate ? new Pace(options.limitRate) : undefined;
    const pool = new BufferPool(MAX_ANSWER_BYTES + 2 * HEADER_BYTES);
    this.#free = (content) => pool.give(content);
    const { timeoutMs } = this.#options;
    this.#connecting = { maxLength: MAX_ANSWER_BYTES, pool, timeoutMs, signal: options.signal };
  }

  /** Throws `not_found`, `bad_name`, `refused`, or `lost` after all attempts, as do all of these. */
  stat(path: string): Promise<Meta> {
    return this.#attempt(async (peer) => {
      await peer.ask({ action: "stat", path });
      const { kind, size, mtime, etag } = await peer.expect("meta");
      return { kind, size, mtime, etag };
    });
  }

  /** The entries of a folder, in the server's order, with those of the folders below it if `recursive`. */
  async *list(path: string, recursive = false): AsyncGenerator<Entry> {
    const peer = await this.#attempt(async (peer) => {
      await peer.ask({ action: "list", path, recursive });
      await peer.peek();
      return peer;
    });
    let complete = false;
    try {
      for (;;) {
        const answer = await peer.expect("entries", "end");
        if (answer.type === "end") break;
        yield* answer.entries;
      }
      complete = true;
    } finally {
      // Whoever stops half-way leaves answers behind that nobody will take.
      if (!complete) this.#drop();
    }
  }

  status(): Promise<Record<string, unknown>> {
    return this.#attempt(async (peer) => {
      await peer.ask({ action: "status" });
      return (await peer.expect("info")).info;
    });
  }

  /**
   * Brings `target` to hold all of one version of `path`, and returns that version. A file that changed is started
   * again where the target allows it, else this throws `changed`. Throws `checksum` when damage stays, `local` for
   * errors of the target.
   */
  async download(path: string, target: Target, hooks: DownloadHooks = {}): Promise<Meta> {
    for (let restarts = 0; ; restarts++) {
      try {
        return await this.#attempt((peer) => this.#fetch(peer, path, target, hooks));
      } catch (error) {
        if (!(error instanceof RepriseError) || error.code !== "changed") throw error;
        if (!target.restartable && target.bytes > 0) {
          throw new RepriseError(
            "changed",
            `${error.message} after ${target.bytes} bytes were given out; get it again`,
          );
        }
        if (restarts >= this.#options.retries) {
          throw new RepriseError("changed", `${error.message}, again and again; get it when it is at rest`);
        }
        this.#options.note(`${error.message}; starting again`);
        target.reset();
      }
    }
  }

  /** Lets go of the connection; the server sees it end between two requests. */
  close(): void {
    this.#drop();
  }

  /** The same, and the server has said goodbye. */
  async quit(): Promise<void> {
    const peer = this.#peer;
    this.#peer = undefined;
    await peer?.quit();
  }

  async #fetch(peer: Peer, path: string, target: Target, hooks: DownloadHooks): Promise<Meta> {
    const start = target.bytes;
    for (;;) {
      const { etag, bytes: offset } = target;
      await peer.ask({ action: "get", path, offset, length: this.#stretch(), etag });
      const { type: _, offset: given, ...meta } = await peer.expect("meta");
      if (given !== offset || (etag !== "" && meta.etag !== etag)) throw unexpected("another part than was asked for");
      target.begin(meta);
      if (offset === start) hooks.begin?.(meta, offset);
      try {
        await this.#receive(peer, target, meta.size, hooks);
      } finally {
        await target.settle();
      }
      if (target.bytes === meta.size) return meta;
      if (target.bytes === offset) throw unexpected(`the end after ${offset} of ${meta.size} bytes`);
    }
  }

  /** All at once; at a limited rate as much as that takes in a while, so that no buffer on the way fills up and stalls. */
  #stretch(): number {
    return this.#pace ? Math.ceil((this.#pace.rate * STRETCH_MS) / 1000) : TO_THE_END;
  }

  async #receive(peer: Peer, target: Target, size: number, hooks: DownloadHooks): Promise<void> {
    let { bytes } = target;
    for (;;) {
      const answer = await peer.expect("data", "end");
      if (answer.type === "end") return;
      const { content, crc32 } = answer;
      bytes += content.length;
      if (bytes > size) throw unexpected("more content than announced");
      peer.progress = true;
      await target.append(content, crc32, this.#free);
      hooks.progress?.(bytes);
      await this.#pace?.take(content.length, this.#signal);
    }
  }

  /** The retry loop around everything: connects where needed, follows redirects, waits longer after each failure. */
  async #attempt<T>(work: (peer: Peer) => Promise<T>): Promise<T> {
    let failures = 0;
    for (;;) {
      const old = this.#peer;
      try {
        this.#signal?.throwIfAborted();
        return await this.#follow(work);
      } catch (error) {
        const peer = this.#peer;
        if (!(error instanceof RepriseError)) throw this.#drop(error);
        const { retry, closes } = ERRORS[error.code];
        if (!retry) throw closes || error.code === "local" ? this.#drop(error) : error;
        // A connection kept from an earlier call may have been closed meanwhile: that is no failure.
        const stale = peer !== undefined && peer === old && !peer.answered;
        this.#drop();
        if (stale) continue;
        if (peer?.progress) failures = 0;
        await this.#waitAfter(error, ++failures);
      }
    }
  }

  async #waitAfter(error: RepriseError, failures: number): Promise<void> {
    const { retries, note } = this.#options;
    if (failures > retries) {
      if (retries === 0) throw error;
      throw new RepriseError(error.code, `${error.message} (given up after ${retries} retries)`, error);
    }
    this.#turn++;
    const wait = Math.min(LAST_RETRY_MS, FIRST_RETRY_MS * 2 ** (failures - 1)) * (0.75 + Math.random() / 2);
    note(`${error.message}; trying again in ${(wait / 1000).toFixed(1)} s (${failures} of ${retries})`);
    await sleep(wait, this.#signal);
  }

  /** Runs `work` at the server, or where the server sends it. */
  async #follow<T>(work: (peer: Peer) => Promise<T>): Promise<T> {
    const { servers } = this.#options;
    const seen = new Set<string>();
    let address = servers[this.#turn % servers.length]!;
    for (;;) {
      try {
        this.#peer ??= await Peer.open({ ...address, ...this.#connecting });
        this.#peer.answered = false;
        return await work(this.#peer);
      } catch (error) {
        if (!(error instanceof Redirected)) throw error;
        this.#drop();
        address = error.address;
        const name = formatAddress(address.host, address.port);
        if (seen.size >= MAX_REDIRECTS || seen.has(name)) throw unexpected(`redirects in a circle, last to ${name}`);
        seen.add(name);
      }
    }
  }

  #drop(error?: unknown): unknown {
    this.#peer?.close();
    this.#peer = undefined;
    return error;
  }
}

/** The server's REDIRECT. */
class Redirected extends Error {
  readonly address: Address;
  constructor(address: Address) {
    super(`redirected to ${formatAddress(address.host, address.port)}`);
    this.address = address;
  }
}

/** One connection to a server: requests go out, answers come in their order. HELLO travels with the first request. */
class Peer {
  readonly #connection: Connection;
  #greeted = false;
  #peeked: Answer | undefined;
  /** An answer has come since the last call began, rather than the end of the connection. */
  answered = false;
  /** Content has come on this connection. */
  progress = false;

  static async open(options: ConnectOptions): Promise<Peer> {
    const connection = await connect(options);
    const { signal } = options;
    signal?.addEventListener("abort", () => connection.fail(signal.reason), { once: true });
    await connection.send(encodeHello());
    return new Peer(connection);
  }

  private constructor(connection: Connection) {
    this.#connection = connection;
  }

  ask(request: Request): Promise<void> {
    return this.#connection.send(encodeRequest(request));
  }

  /** The next answer, which must be of one of these types. Throws what the server says is wrong. */
  async expect<T extends Answer["type"]>(...types: T[]): Promise<Extract<Answer, { type: T }>> {
    const answer = this.#peeked ?? (await this.#answer());
    this.#peeked = undefined;
    if (!(types as string[]).includes(answer.type))
      throw unexpected(`${answer.type} in place of ${types.join(" or ")}`);
    return answer as Extract<Answer, { type: T }>;
  }

  /** Waits for the next answer and leaves it to `expect`. */
  async peek(): Promise<void> {
    this.#peeked ??= await this.#answer();
  }

  async quit(): Promise<void> {
    try {
      await this.ask({ action: "quit" });
      await this.#connection.finish();
    } catch {
      // It has gone already, which is what was wanted.
    }
  }

  close(): void {
    this.#connection.close();
  }

  async #answer(): Promise<Answer> {
    if (!this.#greeted) {
      const welcome = await this.#read();
      if (welcome.type !== "welcome") throw unexpected(`${welcome.type} in place of welcome`);
      this.#greeted = true;
    }
    return this.#read();
  }

  /** A server that has said WELCOME speaks the protocol: what then can't be understood was damaged on the way. */
  async #next(): Promise<Answer | undefined> {
    try {
      const frame = await this.#connection.next();
      return frame && decodeAnswer(frame);
    } catch (error) {
      const damaged = this.#greeted && error instanceof RepriseError && error.code === "bad_frame";
      throw damaged ? new RepriseError("checksum", undefined, error) : error;
    }
  }

  async #read(): Promise<Answer> {
    const answer = await this.#next();
    if (!answer) throw new RepriseError("lost", "the server closed the connection");
    const isLast = answer.type === "error" && ERRORS[answer.error.code].closes;
    if (!isLast) this.answered = true;
    if (answer.type === "error") throw answer.error;
    if (answer.type === "redirect") throw new Redirected(answer);
    return answer;
  }
}

function unexpected(what: string): RepriseError {
  return new RepriseError("bad_frame", `the server does not keep to the protocol: ${what}`);
}

/** `host`, `host:port`, `[v6]:port`, each with `tcp://` if liked, several with commas. Throws `usage`. */
export function parseServers(text: string): Address[] {
  return text.split(",").map((item) => {
    const match = /^(?:tcp:\/\/)?(?:\[([0-9a-f:.%]+)\]|([^\s:/[\]]+))(?::(\d{1,5}))?\/?$/i.exec(item.trim());
    const port = Number(match?.[3] ?? DEFAULT_PORT);
    if (!match || port < 1 || port > 65_535) throw usage(`--server takes host:port, not ${quote(item)}`);
    return { host: (match[1] ?? match[2])!, port };
  });
}

// ---------------------------------------------------------------------------------------------------- commands

const common = {
  server: { type: "string", valueHint: "host:port", description: "Server, or several with commas (REPRISE_SERVER)" },
  timeout: {
    type: "string",
    valueHint: "seconds",
    default: "30",
    description: "Give up a wait after this long without a byte",
  },
  retries: { type: "string", valueHint: "number", default: "10", description: "Further attempts after a failure" },
  "limit-rate": { type: "string", valueHint: "rate", description: "Bytes a second at the most, as in 500K or 10M" },
  quiet: { type: "boolean", alias: "q", description: "Say nothing but errors" },
  json: { type: "boolean", description: "One JSON object a line on stdout" },
} as const;

const destination = {
  directory: {
    type: "string",
    alias: "d",
    valueHint: "dir",
    default: "client_root",
    description: "Folder for what arrives",
  },
} as const;

/** What a command works with: at the prompt one for all lines, else one for the command. */
interface Context {
  remote: Remote;
  server: string;
  /** At the prompt: the folder on the server that names are relative to. */
  folder: string;
  json: boolean;
}

const get = command({
  meta: { name: "get", description: "Get files, going on where an earlier attempt was cut" },
  args: {
    "path…": { type: "positional", description: "Files on the server" },
    ...common,
    ...destination,
    output: { type: "string", alias: "o", valueHint: "file", description: "Name for the file; - is standard output" },
  },
  run: withContext(async (context, args) => {
    const paths = remotePaths(context, args);
    const output = args.output as string | undefined;
    if (output !== undefined && output !== "-" && paths.length > 1)
      throw usage("-o takes one file, use -d for several");
    const targets = paths.map((path) => ({ path, file: output ?? join(String(args.directory), basename(path)) }));
    checkTwins(output === "-" ? [] : targets);
    await forEach(targets, ({ path, file }) => getOne(context, path, file));
  }),
});

const cat = command({
  meta: { name: "cat", description: "Write files to standard output, one after the other" },
  args: { "path…": { type: "positional", description: "Files on the server" }, ...common },
  run: withContext(async (context, args) => {
    await forEach(remotePaths(context, args), (path) => getOne(context, path, "-"));
  }),
});

const ls = command({
  meta: { name: "ls", description: "List a folder" },
  args: {
    path: { type: "positional", required: false, description: "Folder on the server" },
    ...common,
    long: { type: "boolean", alias: "l", description: "With size and time" },
    recursive: { type: "boolean", alias: "r", description: "With the folders below" },
  },
  run: withContext(async (context, args) => {
    const path = resolveRemote(context.folder, String(args.path ?? ""));
    const recursive = args.recursive === true;
    if (context.json) {
      for await (const entry of listing(context.remote, path, recursive)) await print(JSON.stringify(jsonEntry(entry)));
      return;
    }
    const entries = await Array.fromAsync(listing(context.remote, path, recursive));
    entries.sort((a, b) => (a.path < b.path ? -1 : 1));
    const lines = entries.map(args.long ? longLine : shortLine);
    if (lines.length > 0) await print(lines.join("\n"));
  }),
});

const stat = command({
  meta: { name: "stat", description: "Show what is known of a file or folder" },
  args: { path: { type: "positional", description: "File or folder on the server" }, ...common },
  run: withContext(async (context, args) => {
    const path = resolveRemote(context.folder, String(args.path));
    const meta = await context.remote.stat(path);
    const shown = { ...jsonEntry({ ...meta, path }), etag: meta.etag };
    if (context.json) return print(JSON.stringify(shown));
    for (const [name, value] of Object.entries(shown)) await print(`${name.padEnd(6)} ${printable(String(value))}`);
  }),
});

const resume = command({
  meta: { name: "resume", description: "Go on with every interrupted transfer" },
  args: { ...common, ...destination },
  run: withContext(async (context, args) => {
    const found = await resumeAll(context, String(args.directory), args.server === undefined ? args : undefined);
    if (found === 0) say("info", "nothing to resume");
  }),
});

const status = command({
  meta: { name: "status", description: "Show the server's version, workers and replicas" },
  args: common,
  run: withContext(async (context) => {
    const info = await context.remote.status();
    if (context.json) return print(JSON.stringify(info));
    for (const [name, value] of Object.entries(info)) await print(`${name.padEnd(12)} ${printable(render(value))}`);
  }),
});

export const main = command({
  meta: { name: "client.ts", version, description: "reprise client: files, whole, through any interruption" },
  args: { ...common, ...destination },
  subCommands: { get, cat, ls, stat, resume, status },
  run: withContext(async (context, args) => {
    await resumeFirst(context, args);
    await readPrompt(context, args);
  }),
});

// ---------------------------------------------------------------------------------------------------- their parts

/** Turns a function of a context into a command's `run`; the prompt hands its own context in as `data`. */
function withContext(run: (context: Context, args: Args) => Promise<unknown>) {
  return async ({ args, data }: { args: unknown; data?: unknown }): Promise<void> => {
    const options = args as Args;
    if (data) return runAtPrompt(run, data as Context, options);
    setQuiet(options.quiet === true);
    const context = contextFrom(options, watchSignals());
    try {
      await run(context, options);
    } finally {
      context.remote.close();
    }
  };
}

async function runAtPrompt(
  run: (context: Context, args: Args) => Promise<unknown>,
  context: Context,
  args: Args,
): Promise<void> {
  if (args.server !== undefined) throw usage("--server belongs on the command line: the prompt has its server");
  await run({ ...context, json: args.json === true }, args);
}

function contextFrom(args: Args, signal: AbortSignal, server = serverOf(args)): Context {
  const remote = new Remote({
    servers: parseServers(server),
    timeoutMs: secondsOption(args, "timeout"),
    retries: numberOption(args, "retries", { min: 0, max: 1_000_000 }),
    limitRate: sizeOption(args, "limit-rate"),
    signal,
    note: (text) => say("warn", text),
  });
  return { remote, server, folder: "", json: args.json === true };
}

function serverOf(args: Args): string {
  return String(args.server ?? (process.env.REPRISE_SERVER || `127.0.0.1:${DEFAULT_PORT}`));
}

/** Aborts on SIGINT and SIGTERM, and sees to it that the process then ends even if something hangs. */
const interruption = new AbortController();
function watchSignals(): AbortSignal {
  for (const [name, code] of [
    ["SIGINT", "interrupted"],
    ["SIGTERM", "terminated"],
  ] as const) {
    process.on(name, () => {
      const end = () => process.exit(ERRORS[code].exit);
      if (interruption.signal.aborted) end();
      interruption.abort(new RepriseError(code, `${code}; the same command goes on from here`));
      setTimeout(end, INTERRUPT_MS).unref();
    });
  }
  return interruption.signal;
}

/** Every item is tried and each failure has its line; the first one is thrown in the end, and gives the exit status. */
async function forEach<T>(items: T[], work: (item: T) => Promise<void>): Promise<void> {
  let first: unknown;
  for (const item of items) {
    try {
      await work(item);
    } catch (error) {
      const fatal = !(error instanceof RepriseError) || error.code === "pipe_closed" || interruption.signal.aborted;
      if (fatal) throw error;
      report(error);
      first ??= error;
    }
  }
  if (first) throw first;
}

async function getOne(context: Context, path: string, file: string): Promise<void> {
  // What the server would refuse makes no file here.
  splitPath(path);
  if (file === "-") return getStream(context, path, 1, "standard output");
  const found = lookAt(file);
  if (found && !found.isFile() && !found.isDirectory()) return getDevice(context, path, file);
  const started = performance.now();
  if (found?.isFile() && (await isComplete(context.remote, path, file))) return;
  const part = PartFile.open(file, path, context.server, (text) => say("warn", text));
  const offset = part.bytes;
  try {
    const meta = await transfer(context, path, part, () => part.finish());
    if (context.json) {
      const { size, mtime, etag } = meta;
      await print(JSON.stringify({ path, file, size, mtime: isoTime(mtime), etag, offset, ms: sinceMs(started) }));
    }
  } catch (error) {
    if (part.bytes === 0) part.discard();
    throw error;
  } finally {
    part.close();
  }
}

/** Undefined for what is not there, or cannot be: making it says why. */
function lookAt(file: string): Stats | undefined {
  try {
    return statSync(file);
  } catch {
    return undefined;
  }
}

async function getDevice(context: Context, path: string, file: string): Promise<void> {
  let fd: number;
  try {
    fd = openSync(file, constants.O_WRONLY);
  } catch (error) {
    throw asLocal(error, file);
  }
  try {
    await getStream(context, path, fd, file);
  } finally {
    closeSync(fd);
  }
}

async function getStream(context: Context, path: string, fd: number, name: string): Promise<void> {
  const target = new StreamTarget(fd, name);
  try {
    await transfer(context, path, target, async () => {});
  } finally {
    target.close();
  }
}

/** A download with its progress line. */
async function transfer(context: Context, path: string, target: Target, finish: () => Promise<void>): Promise<Meta> {
  const line = showsProgress() ? new (await import("./terminal.ts")).ProgressLine(basename(path)) : undefined;
  let done = false;
  try {
    const meta = await context.remote.download(path, target, {
      begin: (meta, offset) => line?.begin(offset, meta.size),
      progress: (bytes) => line?.update(bytes),
    });
    line?.doing("writing to disk");
    await finish();
    done = true;
    return meta;
  } finally {
    line?.end(done);
  }
}

/** Whether the local file is the server's, by size and time; then nothing is sent. */
async function isComplete(remote: Remote, path: string, file: string): Promise<boolean> {
  const local = statSync(file, { bigint: true });
  const meta = await remote.stat(path);
  // A time set through a double may be off by one microsecond.
  const sameTime = Math.abs(Number(local.mtimeNs / 1000n) - meta.mtime) <= 1;
  if (meta.kind !== "file" || Number(local.size) !== meta.size || !sameTime) return false;
  // A process that died between its last two steps leaves the log of a file that is there.
  if (!statSync(file + PART_SUFFIX, { throwIfNoEntry: false })) removeStaleLog(file);
  say("info", `${printable(file)} is complete already`);
  return true;
}

function removeStaleLog(file: string): void {
  try {
    unlinkSync(file + LOG_SUFFIX);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw asLocal(error, file);
  }
}

/** What comes before the prompt; a person is shown what fails, a script ends with it. */
async function resumeFirst(context: Context, args: Args): Promise<void> {
  try {
    await resumeAll(context, String(args.directory), args.server === undefined ? args : undefined);
  } catch (error) {
    if (!isTerminal(0) || interruption.signal.aborted) throw error;
    report(error);
  }
}

/** Goes on with every download that has a log under `directory`; returns how many there were. */
async function resumeAll(context: Context, directory: string, args: Args | undefined): Promise<number> {
  const logs: string[] = [];
  if (statSync(directory, { throwIfNoEntry: false })?.isDirectory()) {
    for await (const name of new Bun.Glob(`**/*${LOG_SUFFIX}`).scan({ cwd: directory, dot: true }))
      logs.push(join(directory, name));
  }
  await forEach(logs.sort(), async (name) => {
    const log = readLog(name);
    const file = name.slice(0, -LOG_SUFFIX.length);
    if (log === undefined) return;
    if (typeof log === "string") throw new RepriseError("local", `${log}; get ${quote(file)} again`);
    say("info", `resuming ${printable(file)} at ${formatSize(log.bytes)} of ${formatSize(log.size)}`);
    const own = args ? contextFrom(args, interruption.signal, log.server) : undefined;
    try {
      await getOne(own ?? context, log.path, file);
    } finally {
      own?.remote.close();
    }
  });
  return logs.length;
}

/** A folder's entries; a file lists itself. */
async function* listing(remote: Remote, path: string, recursive: boolean): AsyncGenerator<Entry> {
  try {
    yield* remote.list(path, recursive);
  } catch (error) {
    if (!(error instanceof RepriseError) || error.code !== "not_a_folder") throw error;
    yield { ...(await remote.stat(path)), path: basename(path) };
  }
}

function shortLine(entry: Entry): string {
  return printable(entry.path) + (entry.kind === "folder" ? "/" : "");
}

function longLine(entry: Entry): string {
  const size = entry.kind === "folder" ? "-" : String(entry.size);
  return `${size.padStart(14)}  ${isoTime(entry.mtime).slice(0, 19).replace("T", " ")}  ${shortLine(entry)}`;
}

/** `path type size mtime`: contract for `--json`. */
function jsonEntry({ path, kind, size, mtime }: Entry): Record<string, unknown> {
  return { path, type: kind, size, mtime: isoTime(mtime) };
}

/** ISO 8601 in UTC with the microseconds that a Date drops. */
function isoTime(mtime: number): string {
  const micros = ((mtime % 1000) + 1000) % 1000;
  return new Date(Math.floor(mtime / 1000)).toISOString().replace("Z", `${String(micros).padStart(3, "0")}Z`);
}

function render(value: unknown): string {
  if (Array.isArray(value)) return value.length === 0 ? "none" : value.map(render).join(", ");
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

function sinceMs(started: number): number {
  return Math.round(performance.now() - started);
}

/** The paths that a command names, relative to the prompt's folder. */
function remotePaths(context: Context, args: Args): string[] {
  return args._.map((path) => resolveRemote(context.folder, path));
}

/** At the prompt `..`, `.` and a leading slash mean what they mean in a shell; elsewhere the server sees every word. */
function resolveRemote(folder: string, path: string): string {
  if (folder === "") return path.length > 1 && path.endsWith("/") ? path.slice(0, -1) : path === "/" ? "" : path;
  return join("/", folder, path).slice(1).replace(/\/$/, "");
}

function checkTwins(targets: { path: string; file: string }[]): void {
  const seen = new Map<string, string>();
  for (const { path, file } of targets) {
    const twin = seen.get(file);
    if (twin !== undefined) throw usage(`${quote(twin)} and ${quote(path)} would both be written to ${quote(file)}`);
    seen.set(file, path);
  }
}

// ---------------------------------------------------------------------------------------------------- prompt

const PROMPT_HELP = `get PATH…   into the local folder (-o FILE, -d DIR)
ls [PATH]   list a folder (-l, -r)
cd [PATH]   go to a folder on the server
stat PATH   what is known of a file
resume      go on with what was interrupted
help, quit`;

async function readPrompt(context: Context, args: Args): Promise<void> {
  const directory = String(args.directory);
  if (isTerminal(0)) say("info", `connected to ${context.server}; files go to ${directory}/; help lists the commands`);
  let line = new AbortController();
  let busy = false;
  const renew = () => {
    line = new AbortController();
    context.remote = contextFrom(args, AbortSignal.any([line.signal, interruption.signal])).remote;
  };
  context.remote.close();
  renew();
  const { readCommands } = await import("./terminal.ts");
  await readCommands({
    prompt: () => `reprise:/${printable(context.folder)}> `,
    complete: (words) => complete(context, words),
    cancel() {
      if (busy) line.abort(new RepriseError("interrupted", "interrupted; the same command goes on from here"));
      return busy;
    },
    async run(words) {
      if (line.signal.aborted) renew();
      busy = true;
      try {
        return await runLine(context, words, directory);
      } finally {
        busy = false;
      }
    },
  });
}

async function runLine(context: Context, words: string[], directory: string): Promise<boolean> {
  const [name, ...rest] = words;
  if (name === "quit" || name === "exit") {
    await context.remote.quit();
    return false;
  }
  if (name === "help") await print(PROMPT_HELP);
  else if (name === "cd") await changeFolder(context, rest);
  else if (name === "get" || name === "resume") await runWords(main, [name, "-d", directory, ...rest], context);
  else await runWords(main, words, context);
  return true;
}

async function changeFolder(context: Context, words: string[]): Promise<void> {
  if (words.length > 1) throw usage("cd takes one folder");
  const folder = words[0] === undefined ? "" : join("/", context.folder, words[0]).slice(1).replace(/\/$/, "");
  const { kind } = await context.remote.stat(folder);
  if (kind !== "folder") throw new RepriseError("not_a_folder", `not a folder: ${quote(folder)}`);
  context.folder = folder;
}

/** Commands for the first word, names on the server for the others. */
async function complete(context: Context, words: string[]): Promise<string[]> {
  if (words.length <= 1) return ["cd", "get", "help", "ls", "quit", "resume", "stat"];
  const typed = words.at(-1)!;
  const parent = typed.slice(0, typed.lastIndexOf("/") + 1);
  const names: string[] = [];
  for await (const { path, kind } of context.remote.list(resolveRemote(context.folder, parent))) {
    names.push(parent + path + (kind === "folder" ? "/" : ""));
  }
  return names.sort();
}

if (import.meta.main) await runScript(main);
