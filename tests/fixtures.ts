/**
 * Real servers, clients and wires for the tests: processes on free ports and temporary folders, stopped and removed
 * when they go out of scope.
 */
import {
  closeSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import type { Socket, Subprocess } from "bun";
import {
  decodeHello,
  decodeRequest,
  encodeDataHeader,
  encodeEnd,
  encodeWelcome,
  FrameDecoder,
  FrameType,
  type Hello,
  MAX_CONTENT_BYTES,
  type Request,
} from "../protocol.ts";
import type { ResumeLog } from "../resume.ts";

export const HOME = join(import.meta.dir, "..");
/**
 * How long a condition may take to come true before the test fails. Nothing passes by waiting, so that it costs nothing to
 * be patient with a machine that is slow or busy; and short of TEST_MS, so that the test says what it waited for.
 */
const PATIENCE_MS = 120_000;
/** Between two looks at whether it has. */
const LEAST_PAUSE_MS = 5;
const MOST_PAUSE_MS = 100;
/** For setDefaultTimeout in each file: Bun's own five seconds are for tests without processes. */
export const TEST_MS = 400_000;

export interface LogLine {
  event: string;
  status: string;
  peer?: string;
  worker?: number;
  token?: string;
  path?: string;
  to?: string;
  offset?: number;
  bytes?: number;
  ms?: number;
  count?: number;
  why?: string;
  time?: string;
}

/** A temporary folder, on tmpfs or disk as the system has it. */
export function temporaryFolder(parent = tmpdir()): { path: string } & Disposable {
  const path = mkdtempSync(join(parent, "reprise-"));
  return { path, [Symbol.dispose]: () => rmSync(path, { recursive: true, force: true }) };
}

/** A tmpfs of that size; undefined where even root may not have one. */
export function mountSmall(size: string): ({ path: string } & Disposable) | undefined {
  const folder = temporaryFolder();
  const { exitCode } = Bun.spawnSync(["mount", "-t", "tmpfs", "-o", `size=${size}`, "none", folder.path]);
  if (exitCode === 0) {
    const unmount = () => Bun.spawnSync(["umount", "-l", folder.path]);
    return { path: folder.path, [Symbol.dispose]: () => void (unmount() && folder[Symbol.dispose]()) };
  }
  console.log("skipped: this machine does not let root mount a tmpfs");
  folder[Symbol.dispose]();
  return undefined;
}

/** Bytes that no two seeds share and no compressor shortens. */
export function randomBytes(length: number, seed = 1): Uint8Array {
  const words = new Uint32Array(Math.ceil(length / 4));
  let state = seed * 2_654_435_761 || 1;
  for (let index = 0; index < words.length; index++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    words[index] = state;
  }
  return new Uint8Array(words.buffer, 0, length);
}

/** Whole numbers below a limit, the same ones for the same seed. */
export function seeded(seed: number): (limit: number) => number {
  let state = seed;
  return (limit) => {
    // mulberry32: seeds that are neighbours have nothing in common.
    state = (state + 0x6d2b79f5) | 0;
    let word = Math.imul(state ^ (state >>> 15), 1 | state);
    word = (word + Math.imul(word ^ (word >>> 7), 61 | word)) ^ word;
    return Math.floor((((word ^ (word >>> 14)) >>> 0) / 2 ** 32) * limit);
  };
}

/** A file of any size without its size in memory; returns its sha256. */
export function writeLargeFile(path: string, length: number, seed = 1): string {
  const block = randomBytes(1024 * 1024, seed);
  const hasher = new Bun.CryptoHasher("sha256");
  const fd = openSync(path, "w");
  for (let at = 0; at < length; at += block.length) {
    block[0] = at / block.length;
    block[1] = at / block.length / 256;
    const piece = block.subarray(0, Math.min(block.length, length - at));
    writeSync(fd, piece);
    hasher.update(piece);
  }
  closeSync(fd);
  return hasher.digest("hex");
}

export async function sha256(path: string): Promise<string> {
  const hasher = new Bun.CryptoHasher("sha256");
  for await (const chunk of Bun.file(path).stream()) hasher.update(chunk);
  return hasher.digest("hex");
}

/**
 * Returns when `condition` gives something true, and what it gives. It is asked again soon, but not so often that the
 * asking takes the processor from what is waited for: a look at whole trees takes longer than one at a number.
 */
export async function waitFor<T>(what: string, condition: () => T | Promise<T>): Promise<NonNullable<T>> {
  const end = performance.now() + PATIENCE_MS;
  for (let now = performance.now(); now < end; ) {
    const result = await condition();
    if (result) return result;
    const took = performance.now() - now;
    await Bun.sleep(Math.min(Math.max(LEAST_PAUSE_MS, 2 * took), MOST_PAUSE_MS));
    now = performance.now();
  }
  throw new Error(`Never came true: ${what}`);
}

/** What a look at files gives; undefined where something goes while it is looked at. */
export function ifStill<T>(look: () => T): T | undefined {
  try {
    return look();
  } catch (error) {
    if (!["ENOENT", "ENOTDIR"].includes((error as NodeJS.ErrnoException).code ?? "")) throw error;
    return undefined;
  }
}

/** The size of a file, 0 where there is none: as it can be asked for while others write and rename. */
export function sizeOf(path: string): number {
  return statSync(path, { throwIfNoEntry: false })?.size ?? 0;
}

/** All names below a folder, whatever comes and goes meanwhile. */
export function namesBelow(folder: string): string[] {
  const entries = ifStill(() => readdirSync(folder, { withFileTypes: true })) ?? [];
  return entries.flatMap((entry) => {
    const below = entry.isDirectory() ? namesBelow(join(folder, entry.name)) : [];
    return [entry.name, ...below.map((name) => `${entry.name}/${name}`)];
  });
}

/** A log of a transfer, which others write and remove; undefined where there is none. */
export function readResumeLog(path: string): ResumeLog | undefined {
  return ifStill(() => JSON.parse(readFileSync(path, "utf8")) as ResumeLog);
}

/** How much has come by such a log, in all its segments. */
export function loggedIn(path: string): number {
  const { bytes = 0, segments = [] } = readResumeLog(path) ?? {};
  return segments.reduce((sum, segment) => sum + segment.bytes, bytes);
}

// ---------------------------------------------------------------------------------------------------- server

export interface Server extends AsyncDisposable {
  process: Subprocess;
  port: number;
  address: string;
  /** What it logged so far. */
  log: LogLine[];
  stderr(): string;
  /** Process ids of its workers. */
  workers(): number[];
  /** Sends the signal and returns the exit status. */
  stop(signal: NodeJS.Signals): Promise<number>;
}

export interface ServerOptions {
  args?: string[];
  env?: Record<string, string>;
  port?: number;
  cwd?: string;
  /** A command that runs the server, as `nice -n 5` would. */
  runBy?: string[];
  /** Another bun and another copy of the script. */
  program?: [string, string];
  /** Out of reach of the terminal's signals. */
  detached?: boolean;
}

/** Ports for servers: below those that the kernel gives out by itself, and those that tests/engines take. */
const FIRST_PORT = 4_000;
const PORTS_EACH = 50;
const PORT_BLOCKS = 160;
const ports: number[] = [];
const blocks: { unref(): void }[] = [];

/**
 * A port that nobody has: so it is still there for who comes back to it, after all of a server's workers were killed, while
 * other tests start servers of theirs. Each process of tests has blocks of its own, held by the abstract name of a socket
 * that goes with the process: between a look at a port and the server's own, nobody else may look at it.
 */
export function freePort(): number {
  for (;;) {
    if (ports.length === 0) takeBlock();
    const port = ports.shift()!;
    try {
      Bun.listen({ hostname: "127.0.0.1", port, socket: { data() {} } }).stop(true);
      return port;
    } catch {
      // It is taken.
    }
  }
}

function takeBlock(): void {
  const first = Math.floor(Math.random() * PORT_BLOCKS);
  for (let at = 0; at < PORT_BLOCKS; at++) {
    const block = (first + at) % PORT_BLOCKS;
    try {
      const held = Bun.listen({ unix: `\0reprise-test-ports-${block}`, socket: { data() {} } });
      held.unref();
      blocks.push(held);
      const from = FIRST_PORT + block * PORTS_EACH;
      ports.push(...Array.from({ length: PORTS_EACH }, (_, index) => from + index));
      return;
    } catch {
      // Another process has it.
    }
  }
  throw new Error("All ports for tests are taken");
}

/** Starts the real server on `root` and returns when it listens. */
export async function startServer(root: string, options: ServerOptions = {}): Promise<Server> {
  const { args = [], env = {}, port = freePort(), cwd = HOME, runBy = [], detached = false } = options;
  const { program = [process.execPath, join(HOME, "server.ts")] } = options;
  const child = Bun.spawn({
    cmd: [...runBy, ...program, root, "--port", String(port), "--workers", "2", "--log", "json", ...args],
    cwd,
    env: { ...process.env, ...env },
    detached,
    stdio: ["ignore", "pipe", "pipe"],
  });
  const log: LogLine[] = [];
  let errors = "";
  const reading = readLines(child.stderr, (line) => {
    errors += `${line}\n`;
    if (line.startsWith("{")) log.push(JSON.parse(line));
  });
  let first: string | undefined;
  const listening = readLines(child.stdout, (line) => {
    first ??= line;
  });
  await Promise.race([waitFor("the server listens", () => first), child.exited]);
  if (first === undefined) {
    await Promise.all([reading, listening]);
    throw new Error(`The server did not start: ${errors}`);
  }
  const address = first.replace("listening ", "").replace("tcp://", "");
  const stop = async (signal: NodeJS.Signals) => {
    child.kill(signal);
    const status = await child.exited;
    await reading;
    return status;
  };
  return {
    process: child,
    port: Number(address.split(":").pop()),
    address,
    log,
    stderr: () => errors,
    workers: () => childrenOf(child.pid),
    stop,
    async [Symbol.asyncDispose]() {
      const workers = childrenOf(child.pid);
      if (child.exitCode === null) await stop("SIGINT");
      await waitFor("all workers are gone", () => workers.every((pid) => !isAlive(pid)));
    },
  };
}

async function readLines(stream: ReadableStream<Uint8Array>, take: (line: string) => void): Promise<void> {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const chunk of stream) {
    const lines = (rest + decoder.decode(chunk, { stream: true })).split("\n");
    rest = lines.pop()!;
    lines.forEach(take);
  }
  if (rest !== "") take(rest);
}

/** Running children of a process, by /proc. A zombie does not count. */
export function childrenOf(pid: number): number[] {
  const found: number[] = [];
  for (const name of readdirSync("/proc").filter((name) => /^\d+$/.test(name))) {
    const stat = statOf(Number(name));
    if (stat && stat.parent === pid && stat.state !== "Z") found.push(Number(name));
  }
  return found;
}

export function isAlive(pid: number): boolean {
  const stat = statOf(pid);
  return stat !== undefined && stat.state !== "Z";
}

/** Sends a signal to a process that may have gone by itself. */
export function signal(pid: number, name: NodeJS.Signals): void {
  try {
    process.kill(pid, name);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error;
  }
}

/** As the kernel ends a process that takes too much. */
export function killHard(pid: number): void {
  signal(pid, "SIGKILL");
}

/** Kills all workers at once, and returns when as many others are there. */
export async function killWorkers(server: Server): Promise<void> {
  const before = server.workers();
  before.forEach(killHard);
  const areNew = () => server.workers().filter((pid) => !before.includes(pid)).length >= before.length;
  await waitFor("new workers", areNew);
}

function statOf(pid: number): { state: string; parent: number } | undefined {
  try {
    const fields = readFileSync(`/proc/${pid}/stat`, "utf8").split(") ").pop()!.split(" ");
    return { state: fields[0]!, parent: Number(fields[1]) };
  } catch {
    // It has gone.
    return undefined;
  }
}

/** Resident memory of a process in bytes. */
export async function residentBytes(pid: number): Promise<number> {
  const status = await Bun.file(`/proc/${pid}/status`).text();
  return Number(/VmRSS:\s+(\d+) kB/.exec(status)?.[1]) * 1024;
}

/**
 * The most resident memory that a process had by its end. Not by getrusage: its maximum begins with what the parent had
 * when it forked.
 */
export async function peakResidentBytes(pid: number): Promise<number> {
  let peak = 0;
  for (;;) {
    const status = await Bun.file(`/proc/${pid}/status`)
      .text()
      .catch(() => "");
    const found = /VmHWM:\s+(\d+) kB/.exec(status)?.[1];
    if (found === undefined) return peak;
    peak = Number(found) * 1024;
    await Bun.sleep(2);
  }
}

// ---------------------------------------------------------------------------------------------------- client

export interface ClientRun {
  status: number;
  stdout: Uint8Array;
  /** The same as text. */
  output: string;
  errors: string;
}

export interface ClientOptions {
  cwd?: string;
  stdin?: string | Uint8Array;
  env?: Record<string, string>;
  /** A command that runs the client, as `nice -n 5` would. */
  runBy?: string[];
  /** Another script than the client's own. */
  script?: string | undefined;
  /** Out of reach of the terminal's signals. */
  detached?: boolean;
}

/** Starts the real client; `server` goes into REPRISE_SERVER. */
export function spawnClient(server: string, args: string[], options: ClientOptions = {}) {
  return Bun.spawn({
    cmd: [...(options.runBy ?? []), process.execPath, options.script ?? join(HOME, "client.ts"), ...args],
    cwd: options.cwd ?? HOME,
    env: { ...process.env, REPRISE_SERVER: server, ...options.env },
    detached: options.detached ?? false,
    stdio: [options.stdin === undefined ? "ignore" : new Blob([options.stdin as string]), "pipe", "pipe"],
  });
}

/** The same with standard input that the test writes. */
export function spawnFedClient(server: string, args: string[], env: Record<string, string> = {}) {
  return Bun.spawn({
    cmd: [process.execPath, join(HOME, "client.ts"), ...args],
    cwd: HOME,
    env: { ...process.env, REPRISE_SERVER: server, ...env },
    stdio: ["pipe", "pipe", "pipe"],
  });
}

/** Runs the real client to its end. */
export async function runClient(server: string, args: string[], options: ClientOptions = {}): Promise<ClientRun> {
  const child = spawnClient(server, args, options);
  const [stdout, errors, status] = await Promise.all([
    new Response(child.stdout).bytes(),
    new Response(child.stderr).text(),
    child.exited,
  ]);
  return { status, stdout, output: new TextDecoder().decode(stdout), errors };
}

// ---------------------------------------------------------------------------------------------------- wire

/** What a server of our own says to a request, frame by frame; undefined ends the connection. */
export type Answering = (request: Request, connection: number) => Frames | Promise<Frames>;
type Frames = (Uint8Array | undefined)[];

export interface FakeServer extends Disposable {
  port: number;
  address: string;
  /** What came, in order, over all connections. */
  requests: Request[];
  hellos: Hello[];
  /** Connections that are open. */
  open(): number;
}

export interface FakeOptions {
  /** What is said to HELLO, in place of WELCOME. */
  greet?: (hello: Hello, connection: number) => Frames;
  tls?: { cert: string; key: string };
  /** An upload is answered once all of its content has come. */
  takesAll?: boolean;
}

/** A server that speaks the protocol and answers whatever the test wants. What content comes it forgets. */
export function startFakeServer(answer: Answering, { greet, tls, takesAll }: FakeOptions = {}): FakeServer {
  interface State {
    decoder: FrameDecoder;
    greeted: boolean;
    number: number;
    waiting: Frames;
    turn: Promise<void>;
    /** The content of an upload has come. */
    ended?: () => void;
  }
  const requests: Request[] = [];
  const hellos: Hello[] = [];
  let connections = 0;
  let open = 0;
  const flush = (socket: Socket<State>) => {
    const { waiting } = socket.data;
    while (waiting.length > 0) {
      if (!waiting[0]) return void socket.end();
      const taken = socket.write(waiting[0]);
      if (taken < waiting[0].length) {
        waiting[0] = waiting[0].subarray(Math.max(0, taken));
        return;
      }
      waiting.shift();
    }
  };
  const send = (socket: Socket<State>, frames: Frames) => {
    socket.data.waiting.push(...frames);
    flush(socket);
  };
  const listener = Bun.listen<State>({
    hostname: "127.0.0.1",
    port: 0,
    ...(tls && { tls }),
    socket: {
      open(socket) {
        open++;
        const decoder = new FrameDecoder({ maxLength: MAX_CONTENT_BYTES });
        socket.data = { decoder, greeted: false, number: ++connections, waiting: [], turn: Promise.resolve() };
      },
      data(socket, bytes) {
        const { data } = socket;
        data.decoder.push(new Uint8Array(bytes));
        for (let frame = data.decoder.next(); frame; frame = data.decoder.next()) {
          if (!data.greeted) {
            data.greeted = true;
            const hello = decodeHello(frame);
            hellos.push(hello);
            send(socket, greet?.(hello, data.number) ?? [encodeWelcome("fake")]);
            continue;
          }
          if (frame.type === FrameType.END) data.ended?.();
          if (frame.type === FrameType.DATA || frame.type === FrameType.END) continue;
          const request = decodeRequest(frame);
          requests.push(request);
          const isWhole = !takesAll || request.action !== "put" || request.content !== undefined;
          const ended = isWhole ? undefined : new Promise<void>((resolve) => Object.assign(data, { ended: resolve }));
          data.turn = data.turn.then(() => ended).then(async () => send(socket, await answer(request, data.number)));
        }
      },
      drain: flush,
      close: () => void open--,
      error() {},
    },
  });
  return {
    port: listener.port,
    address: `127.0.0.1:${listener.port}`,
    requests,
    hellos,
    open: () => open,
    [Symbol.dispose]: () => listener.stop(true),
  };
}

/** DATA frames and END. */
export function contentFrames(content: string): Uint8Array[] {
  const bytes = Buffer.from(content);
  const frames: Uint8Array[] = [];
  for (let at = 0; at < bytes.length; at += MAX_CONTENT_BYTES) {
    const piece = bytes.subarray(at, at + MAX_CONTENT_BYTES);
    frames.push(encodeDataHeader(piece.length, Bun.hash.crc32(piece)), piece);
  }
  return [...frames, encodeEnd(bytes.length)];
}

/** A raw connection that collects what comes. */
export async function connectRaw(port: number, hostname = "127.0.0.1"): Promise<RawConnection> {
  let closed = false;
  const chunks: Uint8Array[] = [];
  const socket = await Bun.connect({
    hostname,
    port,
    socket: {
      data: (_, bytes) => void chunks.push(new Uint8Array(bytes)),
      close: () => {
        closed = true;
      },
      error: () => {
        closed = true;
      },
    },
  });
  return {
    socket,
    received: () => Buffer.concat(chunks),
    closed: () => closed,
    [Symbol.dispose]: () => void socket.terminate(),
  };
}

export interface RawConnection extends Disposable {
  socket: Socket;
  received(): Buffer;
  closed(): boolean;
}

// ---------------------------------------------------------------------------------------------------- trees

/** Files of a tree by name and content; a name that ends in a slash is a folder. */
export type Files = Record<string, Uint8Array | string>;

export function writeTree(folder: string, files: Files): void {
  for (const [name, content] of Object.entries(files)) {
    const path = join(folder, name);
    mkdirSync(name.endsWith("/") ? path : dirname(path), { recursive: true });
    if (!name.endsWith("/")) writeFileSync(path, content);
  }
}

/** A tree below a new temporary folder. */
export function makeRoot(files: Files, parent?: string): { path: string } & Disposable {
  const root = temporaryFolder(parent);
  writeTree(root.path, files);
  return root;
}

/**
 * All that is below a folder, a line each, in order: name, kind, and of a file its size, time in microseconds and a hash
 * of its content. A server's own folder at the top does not count, anything else that is hidden does.
 */
export function treeOf(folder: string): string[] {
  const lines: string[] = [];
  const waiting = [""];
  for (let below = waiting.pop(); below !== undefined; below = waiting.pop()) {
    for (const name of readdirSync(join(folder, below))) {
      const path = below === "" ? name : `${below}/${name}`;
      if (path === ".reprise") continue;
      const stat = lstatSync(join(folder, path), { bigint: true });
      if (stat.isDirectory()) waiting.push(path);
      lines.push(stat.isFile() ? `${path} file ${describe(join(folder, path), stat)}` : `${path} ${kindOf(stat)}`);
    }
  }
  return lines.sort();
}

function describe(path: string, { size, mtimeNs }: { size: bigint; mtimeNs: bigint }): string {
  return `${size} ${mtimeNs / 1000n} ${Bun.hash(readFileSync(path)).toString(16)}`;
}

function kindOf(stat: { isDirectory(): boolean }): string {
  return stat.isDirectory() ? "folder" : "other";
}
