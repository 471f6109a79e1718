/**
 * Every system call of uploads and downloads made to fail once, on the server and on the client, in each way that fits
 * it: the disk full, an error of the disk, out of descriptors, interrupted, a short write.
 *
 * After each fault either the client said that all is done, and it is; or it has failed with a status and a line, and
 * under no final name is anything but one whole version. The same command then succeeds, and the server serves others.
 *
 *     REPRISE_FAULTS=all bun test tests/faults/syscalls.test.ts    every call, some minutes; what is above a sample
 *     REPRISE_FAULTS=7 bun test tests/faults/syscalls.test.ts      another sample, beginning with the seventh
 */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import {
  type ClientRun,
  type Files,
  randomBytes,
  runClient,
  type Server,
  startServer,
  TEST_MS,
  temporaryFolder,
  waitFor,
  writeTree,
} from "../fixtures.ts";
import { attach, type Call, type Fault, traced, whyNoStrace } from "./strace.ts";

const WANTED = process.env.REPRISE_FAULTS ?? "1";
const IS_ALL = WANTED === "all";
/** Of all faults a sample takes so many for each operation and side. */
const SAMPLE = 8;
/** And these of each in any case, for they were handled wrongly once. */
const ALWAYS = [
  "fsync 1 error=EIO",
  "fsync 2 error=EIO",
  "fsync 1 error=EINTR",
  "ftruncate 1 error=EIO",
  "unlink 1 error=EIO",
];
setDefaultTimeout(IS_ALL ? 30 * 60_000 : TEST_MS);

const missing = await whyNoStrace();
if (missing) console.log(`skipped: the tests of failing system calls: ${missing}`);

/** What can become of a call. Of a short write only one byte was written: see `content`. */
const HOWS: Record<string, string[]> = {
  openat: ["error=EIO", "error=EMFILE", "error=ENOSPC", "error=EINTR"],
  openat2: ["error=EIO", "error=EMFILE", "error=EINTR", "error=EAGAIN"],
  statx: ["error=EIO"],
  newfstatat: ["error=EIO"],
  statfs: ["error=EIO"],
  fstatfs: ["error=EIO"],
  getdents64: ["error=EIO"],
  read: ["error=EIO", "error=EINTR"],
  pread64: ["error=EIO", "error=EINTR"],
  preadv2: ["error=EIO", "error=EINTR", "error=EAGAIN"],
  write: ["error=EIO", "error=ENOSPC", "error=EINTR"],
  pwrite64: ["error=EIO", "error=ENOSPC", "error=EDQUOT", "error=EINTR", "retval=1"],
  pwritev: ["error=EIO", "error=ENOSPC", "error=EDQUOT", "error=EINTR", "retval=1"],
  fsync: ["error=EIO", "error=ENOSPC", "error=EINTR"],
  ftruncate: ["error=EIO", "error=EINTR"],
  rename: ["error=EIO", "error=ENOSPC"],
  renameat: ["error=EIO", "error=ENOSPC"],
  renameat2: ["error=EIO", "error=ENOSPC", "error=ENOSYS"],
  mkdir: ["error=EIO", "error=ENOSPC"],
  mkdirat: ["error=EIO", "error=ENOSPC"],
  unlink: ["error=EIO"],
  unlinkat: ["error=EIO"],
  flock: ["error=ENOLCK", "error=EINTR"],
  utimensat: ["error=EIO"],
  sync_file_range: ["error=EIO"],
  close: ["error=EIO"],
  sendfile: ["error=EIO", "error=EINTR", "error=EAGAIN"],
  sendto: ["error=ECONNRESET", "error=ENOBUFS", "error=EINTR"],
  recvfrom: ["error=ECONNRESET", "error=EINTR"],
  accept4: ["error=EMFILE", "error=ECONNABORTED", "error=EINTR"],
  socket: ["error=EMFILE"],
  connect: ["error=ECONNREFUSED", "error=EINTR"],
};
const CALLS = Object.keys(HOWS);
const SOCKET_CALLS = ["sendto", "recvfrom", "socket", "connect"];
/** After these nothing is lost, and nobody has to hear of it. */
const HARMLESS = ["error=EINTR", "error=EAGAIN", "retval=1"];

/**
 * strace says that a byte was written, and writes none: it stays what a new file has there, zero. So that this is right,
 * every piece that is written begins with zeros, one for each thread that may meet the fault.
 */
function content(length: number, seed: number): Uint8Array {
  const bytes = randomBytes(length, seed);
  for (let at = 0; at < length; at += 4096) bytes.fill(0, at, at + 8);
  return bytes;
}

const LARGE = content(1_500_000, 1);
const SMALL = content(5_000, 2);

interface Operation {
  name: string;
  direction: "put" | "get";
  files: Files;
  /** What is there before, under the same names. */
  old?: Files;
}

const OPERATIONS: Operation[] = [
  { name: "put of a new large file", direction: "put", files: { f: LARGE } },
  { name: "put of a small file over another", direction: "put", files: { f: SMALL }, old: { f: "old" } },
  { name: "put -r", direction: "put", files: { a: SMALL, "b/c": content(100, 3), "b/d": LARGE }, old: { a: "old" } },
  { name: "get of a new large file", direction: "get", files: { f: LARGE } },
  { name: "get of a small file over another", direction: "get", files: { f: SMALL }, old: { f: "old" } },
  { name: "get -r", direction: "get", files: { a: SMALL, "b/c": content(100, 3), "b/d": LARGE }, old: { a: "old" } },
];

/** One operation on folders of its own; done again and again from the same start. */
class Bench {
  readonly #operation: Operation;
  readonly #server: Server;
  readonly #staging: string;
  readonly #local: string;
  readonly #remote: string;
  readonly #target: string;

  constructor(operation: Operation, server: Server, root: string, base: string, name: string) {
    this.#operation = operation;
    this.#server = server;
    this.#staging = join(root, ".reprise");
    this.#local = join(base, name);
    this.#remote = name;
    const [here, there] = [join(this.#local, name), join(root, name)];
    this.#target = operation.direction === "put" ? there : here;
    writeTree(operation.direction === "put" ? here : there, operation.files);
  }

  /** The target as it was, and nothing left of an earlier attempt. */
  reset(): void {
    rmSync(this.#target, { recursive: true, force: true });
    rmSync(this.#logs, { recursive: true, force: true });
    for (const name of this.#staged()) rmSync(join(this.#staging, name));
    writeTree(this.#target, { "./": "", ...this.#operation.old });
  }

  #staged(): string[] {
    return readdirSync(this.#staging).filter((name) => name !== "lock");
  }

  /** Where uploads keep their logs. */
  get #logs(): string {
    return join(this.#local, "logs");
  }

  run(runBy: string[] = []): Promise<ClientRun> {
    const { direction, files } = this.#operation;
    const isFolder = Object.keys(files).length > 1;
    const here = join(this.#local, this.#remote);
    const commands = {
      put: isFolder ? ["-r", here] : [join(here, "f"), "-t", `${this.#remote}/f`],
      get: isFolder ? ["-r", this.#remote] : [`${this.#remote}/f`],
    };
    const into = direction === "put" ? this.#logs : isFolder ? this.#local : here;
    const args = [direction, ...commands[direction], "-d", into, "--timeout", "5", "--retries", "2"];
    return runClient(this.#server.address, args, { runBy });
  }

  /** What is under the final names: "new", "other" if it is what it may be, or what is wrong with it. */
  look(): string {
    const { files, old = {} } = this.#operation;
    const found = new Map(filesBelow(this.#target).map((name) => [name, readFileSync(join(this.#target, name))]));
    for (const [name, bytes] of found) {
      const versions = [files[name], old[name]].filter((version) => version !== undefined);
      if (!versions.some((version) => bytes.equals(Buffer.from(version as string)))) {
        return `${name} is no version of it: ${bytes.length} bytes`;
      }
    }
    const isNew = Object.entries(files).every(([name, bytes]) => found.get(name)?.equals(Buffer.from(bytes as string)));
    return isNew ? "new" : "other";
  }

  /** Everything that is still unfinished, here and there. */
  leftovers(): string[] {
    const local = existsSync(this.#local) ? (readdirSync(this.#local, { recursive: true }) as string[]) : [];
    return [...this.#staged(), ...local.filter((name) => UNFINISHED.test(name) && !/\.aside-\d+\.part$/.test(name))];
  }
}

const UNFINISHED = /\.part$|\.resume\.json|\.lock$|reprise/;

function filesBelow(folder: string): string[] {
  const entries = readdirSync(folder, { recursive: true, withFileTypes: true });
  return entries
    .filter((entry) => entry.isFile() && !UNFINISHED.test(entry.name))
    .map((entry) => join(entry.parentPath, entry.name).slice(folder.length + 1));
}

/** Of the files at stake or a connection, and not of what the runtime does for itself. */
function isOurs({ name, text }: Call, base: string): boolean {
  return SOCKET_CALLS.includes(name) || text.includes(base) || text.includes('"/proc/self/fd/');
}

function openFiles(pid: number): number {
  return readdirSync(`/proc/${pid}/fd`).length;
}

/** All faults for the calls that a run without any made. */
function faultsFor(calls: Call[], base: string): Fault[] {
  const counts = new Map<string, number>();
  const places = new Set<string>();
  for (const call of calls) {
    const { thread, name } = call;
    const at = (counts.get(`${thread} ${name}`) ?? 0) + 1;
    counts.set(`${thread} ${name}`, at);
    if (isOurs(call, base)) places.add(`${name} ${at}`);
  }
  return [...places].sort().flatMap((place) => {
    const [call = "", at] = place.split(" ");
    return (HOWS[call] ?? []).map((how) => ({ call, how, at: Number(at) }));
  });
}

function nameOf({ call, how, at }: Fault): string {
  return `${call} ${at} ${how}`;
}

/** All, or some of them that lie far apart, so that each kind of call has its chance. */
function sampleOf(faults: Fault[]): Fault[] {
  if (IS_ALL) return faults;
  const step = Math.max(1, faults.length / SAMPLE);
  const first = Number(WANTED) % step;
  const sample = new Set(Array.from({ length: SAMPLE }, (_, index) => Math.floor(first + index * step)));
  return faults.filter((fault, index) => sample.has(index) || ALWAYS.includes(nameOf(fault)));
}

/** What is wrong with what came of a fault. */
function judge(bench: Bench, fault: Fault, run: ClientRun, met: boolean): string[] {
  const problems: string[] = [];
  const state = bench.look();
  if (met && run.errors.includes("internal error")) problems.push(`taken for a bug: ${run.errors}`);
  if (state !== "new" && state !== "other") problems.push(state);
  if (run.status === 0 && state !== "new") problems.push("said to be done, and is not");
  if (run.status !== 0 && run.errors.trim() === "") problems.push(`status ${run.status} without a word`);
  if (run.status !== 0 && met && HARMLESS.includes(fault.how)) problems.push(`not survived: ${run.errors}`);
  // Bun itself, before it runs anything of ours, ends over some of them, loudly.
  const isBun = run.errors.includes("oh no: Bun has crashed") && /Elapsed: \d{1,2}ms/.test(run.errors);
  if (run.status > 128 && !isBun) problems.push(`died with ${run.status}: ${run.errors}`);
  return problems;
}

/** Whether what could not be synced was synced later: a folder the same, content perhaps as that of another attempt. */
function isSynced(calls: Call[]): boolean {
  const syncs = calls
    .filter(({ name }) => name === "fsync")
    .map(({ text, failed }) => ({ of: syncedPath(text), failed }));
  return syncs.every(
    ({ of, failed }, index) => !failed || syncs.slice(index).some((sync) => sync.of === of && !sync.failed),
  );
}

/** `(12</srv/.reprise/new-47-1>) = 0` */
function syncedPath(text: string): string {
  return (/<(.*)>/.exec(text)?.[1] ?? "").replace(/\/\.reprise\/.*/, "/.reprise/");
}

interface Result {
  faults: number;
  met: number;
  problems: string[];
}

/** How a side is made to fail: the command with the fault, and afterwards what is wrong with what is left. */
interface Side {
  runWith(fault?: Fault): Promise<{ run: ClientRun; calls: Call[] }>;
  look(): Promise<string[]>;
}

/** Each fault in turn, and the same command without one after it. */
async function runAll(bench: Bench, base: string, side: Side): Promise<Result> {
  bench.reset();
  const clean = await side.runWith();
  expect(clean.run).toMatchObject({ status: 0 });
  const faults = sampleOf(faultsFor(clean.calls, base));
  const result: Result = { faults: faults.length, met: 0, problems: [] };
  for (const fault of faults) {
    bench.reset();
    const { run, calls } = await side.runWith(fault);
    const met = calls.find((call) => call.injected && isOurs(call, base));
    if (met) result.met++;
    const problems = judge(bench, fault, run, met !== undefined);
    if (run.status === 0 && !isSynced(calls)) problems.push("said to be done, and is not on disk");
    problems.push(...(await judgeAgain(bench)), ...(await side.look()));
    result.problems.push(...problems.map((problem) => `${nameOf(fault)}: ${problem} (${met?.name}${met?.text})`));
  }
  return result;
}

/** What is wrong with the same command after it. */
async function judgeAgain(bench: Bench): Promise<string[]> {
  const { status, errors } = await bench.run();
  const leftovers = bench.leftovers();
  const isDone = status === 0 && bench.look() === "new";
  return [...(isDone ? [] : [`again: ${status} ${errors}`]), ...(leftovers.length > 0 ? [`left: ${leftovers}`] : [])];
}

/** Most of the faults come about: the order of calls is nearly the same every time, but not quite. */
function expectMet({ faults, met, problems }: Result): void {
  if (IS_ALL) console.log(`${faults} faults, ${met} met`);
  expect(problems).toEqual([]);
  expect(faults).toBeGreaterThan(0);
  expect(met).toBeGreaterThan(faults / 2);
}

describe.skipIf(missing !== undefined)("a call that fails", () => {
  const base = temporaryFolder();
  const root = join(base.path, "root");
  writeTree(root, { other: "other" });
  let server: Server;
  beforeAll(async () => {
    // One worker with few threads, so that the same call is the same one the next time.
    const options = { args: ["--workers", "1", "--writable"], env: { UV_THREADPOOL_SIZE: "2" } };
    server = await startServer(root, options);
  });
  afterAll(async () => {
    await server[Symbol.asyncDispose]();
    base[Symbol.dispose]();
  });

  /** The same worker serves others, and has closed what it had open. */
  async function lookAtServer(worker: number, openBefore: number): Promise<string[]> {
    const { output } = await runClient(server.address, ["cat", "other"]);
    if (output !== "other") return ["the server does not serve"];
    if (!server.workers().includes(worker)) return ["the worker has died"];
    return waitFor("", () => openFiles(worker) <= openBefore).then(
      () => [],
      () => [`${openFiles(worker) - openBefore} files stay open`],
    );
  }

  test.each(OPERATIONS.map((operation, index) => [operation.name, operation, index] as const))(
    "on the server, %s",
    async (_, operation, index) => {
      const bench = new Bench(operation, server, root, base.path, `server-${index}`);
      const worker = server.workers()[0]!;
      let openBefore = 0;
      const runWith = async (fault?: Fault) => {
        // What strace keeps from being closed stays open.
        openBefore = openFiles(worker) + (fault?.call === "close" ? 4 : 0);
        await using tracing = await attach(worker, { calls: CALLS, fault });
        const run = await bench.run();
        return { run, calls: await tracing.stop() };
      };
      expectMet(await runAll(bench, base.path, { runWith, look: () => lookAtServer(worker, openBefore) }));
    },
  );

  test.each(OPERATIONS.map((operation, index) => [operation.name, operation, index] as const))(
    "on the client, %s",
    async (_, operation, index) => {
      const bench = new Bench(operation, server, root, base.path, `client-${index}`);
      const runWith = async (fault?: Fault) => {
        using strace = traced({ calls: CALLS, fault });
        const run = await bench.run(strace.runBy);
        return { run, calls: strace.calls() };
      };
      expectMet(await runAll(bench, base.path, { runWith, look: async () => [] }));
    },
  );
});

/** Asked for the first time by the first upload; after that it is known for a while, and no fault would be met above. */
test.skipIf(missing !== undefined)("on the server, a put whose room cannot be asked for", async () => {
  using base = temporaryFolder();
  const root = join(base.path, "root");
  writeTree(root, { other: "other" });
  await using server = await startServer(root, { args: ["--workers", "1", "--writable"] });
  const bench = new Bench(OPERATIONS[0]!, server, root, base.path, "room");
  bench.reset();
  await using tracing = await attach(server.workers()[0]!, {
    calls: CALLS,
    fault: { call: "statfs", how: "error=EIO", at: 1 },
  });
  const { status, errors } = await bench.run();
  const calls = await tracing.stop();
  expect(calls.some(({ injected }) => injected)).toBe(true);
  if (status !== 0) expect(errors).not.toBe("");
  expect(await judgeAgain(bench)).toEqual([]);
});
