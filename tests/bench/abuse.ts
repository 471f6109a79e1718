/**
 * What the peers that no server likes cost it, and those that use it well.
 *
 * ```sh
 * bun run bench:abuse                            # every part, 5 rounds
 * bun run bench:abuse --only idle --idle 1000    # one part
 * ```
 *
 * Parts: `beside`, a normal client's time beside 500 peers that send a byte a second and 500 that ask for a large file
 * and never read it, against its time alone, in turn; `idle`, the memory of the workers for each idle connection; and
 * `flood`, connections past the limit for 5 s: the processor's time that they take and leave, and when a normal client
 * is served again. A line ends in the figure to reach. A client's time is that of its whole process. The server has two
 * workers, and the bad peers a process of their own.
 */
import { existsSync, openSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { cpus } from "node:os";
import { join } from "node:path";
import { formatSize } from "../../command.ts";
import { childrenOf, HOME, temporaryFolder, waitFor, writeLargeFile } from "../fixtures.ts";
import { client, formatCount, median, parseCount, parseSize, printVersions, readOptions, time } from "./bench.ts";
import { type Heap, heapEnvironment } from "./heap.ts";
import { type Kind, startPeers } from "./peers.ts";

const options = readOptions({ rounds: "5", size: "200M", idle: "4000", peers: "500", only: "" });
const ROUNDS = parseCount(options.rounds);
const SIZE = parseSize(options.size);
const PEERS = parseCount(options.peers);
/** Idle connections: none, a quarter, a half, all. */
const STEPS = [0, 0.25, 0.5, 1].map((part) => Math.round(part * parseCount(options.idle)));
const SMALL_BYTES = 4096;
/** Runs of the client in a round: a small file takes hardly longer than the process, and varies more. */
const LARGE_RUNS = 3;
const SMALL_RUNS = 10;
const FLOOD_MS = 5000;
const FLOOD_LIMIT = 100;
/** Of /proc/PID/stat; the same on every Linux that Bun runs on. */
const TICKS_PER_SECOND = 100;
/** The workers are at rest once they take less than this part of one processor. */
const REST_SHARE = 0.2;
const REST_MS = 500;
/** After a collection memory goes back to the kernel only by and by. */
const GIVE_BACK_MS = 1000;

const PARTS: Record<string, (root: string) => Promise<void>> = { beside, idle, flood };

// ---------------------------------------------------------------------------------------------------- server

interface Server extends AsyncDisposable {
  pid: number;
  port: number;
  workers(): number[];
  run(name: string): Promise<number>;
}

/** Its log goes nowhere: read by the bench, it would take time from all. */
async function startServer(root: string, args: string[] = [], env: Record<string, string> = {}): Promise<Server> {
  const cmd = [process.execPath, join(HOME, "server.ts"), root, "--port", "0", "--workers", "2", "--log", "json"];
  const stdio: ["ignore", "pipe", number] = ["ignore", "pipe", openSync("/dev/null", "w")];
  const child = Bun.spawn([...cmd, ...args], { env: { ...process.env, ...env }, stdio });
  const { value } = await child.stdout.getReader().read();
  const port = /:(\d+)\s*$/.exec(new TextDecoder().decode(value))?.[1];
  if (!port) throw new Error("The server did not start");
  return {
    pid: child.pid,
    port: Number(port),
    workers: () => childrenOf(child.pid),
    run: (name) => time(client("get", name, "-o", "/dev/null", "-q"), { REPRISE_SERVER: `127.0.0.1:${port}` }),
    async [Symbol.asyncDispose]() {
      child.kill("SIGINT");
      await child.exited;
    },
  };
}

/** Seconds of processor time that the server's processes have taken. */
function processorSeconds({ pid, workers }: Server): number {
  let ticks = 0;
  for (const each of [pid, ...workers()]) {
    const fields = readFileSync(`/proc/${each}/stat`, "utf8").split(") ").pop()!.split(" ");
    ticks += Number(fields[11]) + Number(fields[12]);
  }
  return ticks / TICKS_PER_SECOND;
}

/** The part of one processor that the server takes while `ms` pass. */
async function processorShare(server: Server, ms: number): Promise<number> {
  const before = processorSeconds(server);
  const startedAt = performance.now();
  await Bun.sleep(ms);
  return ((processorSeconds(server) - before) * 1000) / (performance.now() - startedAt);
}

async function untilAtRest(server: Server): Promise<void> {
  await waitFor("the workers are at rest", async () => (await processorShare(server, REST_MS)) < REST_SHARE);
}

/** Connections are counted where they cost: one that the kernel holds for the server is none yet. */
function countSockets(server: Server): number {
  return server.workers().reduce((sum, pid) => sum + readdirSync(`/proc/${pid}/fd`).length, 0);
}

// ---------------------------------------------------------------------------------------------------- beside

async function beside(root: string): Promise<void> {
  await using server = await startServer(root);
  const nobody = countSockets(server);
  const times: Record<string, { alone: number[]; beside: number[] }> = {};
  const measure = async (when: "alone" | "beside") => {
    for (const [name, runs] of [
      ["normal", LARGE_RUNS],
      ["small", SMALL_RUNS],
    ] as const) {
      times[name] ??= { alone: [], beside: [] };
      for (let run = 0; run < runs; run++) times[name][when].push(await server.run(name));
    }
  };
  let share = 0;
  for (let round = 0; round < ROUNDS; round++) {
    await untilAtRest(server);
    await measure("alone");
    await using peers = startPeers(server.port);
    await peers.order({ trickling: PEERS, deaf: PEERS });
    await waitFor("all are accepted", () => countSockets(server) >= nobody + 2 * PEERS);
    await untilAtRest(server);
    share = await processorShare(server, 2000);
    await measure("beside");
  }
  console.log(
    `Beside ${PEERS} peers that send a byte a second and ${PEERS} that never read; they alone take the server`,
  );
  console.log(`${formatShare(share)} of a processor. A client's time, medians of ${ROUNDS} rounds:\n`);
  console.log("| get | alone | beside them | at most 1.5 x |\n|---|---|---|---|");
  for (const [name, { alone, beside }] of Object.entries(times)) {
    const [without, among] = [median(alone), median(beside)];
    const size = formatSize(name === "small" ? SMALL_BYTES : SIZE);
    console.log(`| ${size} | ${formatMs(without)} | ${formatMs(among)} | ${(among / without).toFixed(2)} x |`);
  }
}

// ---------------------------------------------------------------------------------------------------- idle

interface Step {
  connections: number;
  /** Bytes of all workers. */
  resident: number;
  heap?: Heap;
}

async function idle(root: string): Promise<void> {
  const [, ...more] = STEPS;
  console.log(
    `Memory of the workers for each idle connection: the slope over ${more.join(", ")} of them, because the first`,
  );
  console.log(`make the server compile and allocate what all use. Medians of ${ROUNDS} servers, and their range:\n`);
  console.log("| connections | resident, at most 4 KB | after a collection | live JavaScript objects | which |");
  console.log("|---|---|---|---|---|");
  for (const kind of ["connected", "greeted"] as const) {
    using folder = temporaryFolder();
    const asItIs: Step[][] = [];
    const collected: Step[][] = [];
    // A collection that is asked for changes what comes after: so these are other servers.
    for (let round = 0; round < ROUNDS; round++) {
      asItIs.push(await idleSteps(root, kind));
      collected.push(await idleSteps(root, kind, folder.path));
    }
    const resident = ({ resident }: Step) => resident;
    const slopes = [slopesOf(asItIs, resident), slopesOf(collected, resident)];
    const live = slopesOf(collected, ({ heap }) => heap!.size);
    const what = kind === "greeted" ? "after their greeting" : "before HELLO";
    console.log(`| ${[what, ...slopes, live, kindsOf(collected[0]!)].join(" | ")} |`);
  }
}

function slopesOf(rounds: Step[][], value: (step: Step) => number): string {
  const slopes = rounds.map(([, ...steps]) => slope(steps.map((step) => [step.connections, value(step)])));
  const [least, most] = [Math.min(...slopes), Math.max(...slopes)].map(formatCount);
  return `${formatCount(median(slopes))} bytes (${least} to ${most})`;
}

/** With a folder for heaps they are measured too. */
async function idleSteps(root: string, kind: Kind, folder?: string): Promise<Step[]> {
  const env = folder ? heapEnvironment(folder) : {};
  await using server = await startServer(root, ["--max-connections", "9000", "--idle-timeout", "600"], env);
  const nobody = countSockets(server);
  await using peers = startPeers(server.port);
  const steps: Step[] = [];
  for (const connections of STEPS) {
    await peers.order({ [kind]: connections });
    await waitFor("all are accepted", () => countSockets(server) >= nobody + connections);
    await untilAtRest(server);
    const heap = folder && mergeHeaps(await Promise.all(server.workers().map((pid) => heapOf(pid, folder))));
    if (folder) await Bun.sleep(GIVE_BACK_MS);
    steps.push({ connections, resident: ownBytes(server), ...(heap && { heap }) });
  }
  return steps;
}

async function heapOf(pid: number, folder: string): Promise<Heap> {
  const path = join(folder, `${pid}.heap`);
  process.kill(pid, "SIGUSR2");
  await waitFor("the heap is measured", () => existsSync(path));
  const heap = JSON.parse(readFileSync(path, "utf8"));
  rmSync(path);
  return heap;
}

function mergeHeaps(heaps: Heap[]): Heap {
  const merged: Heap = { size: 0, objects: 0, kinds: {} };
  for (const { size, objects, kinds } of heaps) {
    merged.size += size;
    merged.objects += objects;
    for (const [kind, count] of Object.entries(kinds)) merged.kinds[kind] = (merged.kinds[kind] ?? 0) + count;
  }
  return merged;
}

/** The kinds of objects that there are more of with each connection. */
function kindsOf(steps: Step[]): string {
  const [first, last] = [steps[0]!, steps.at(-1)!];
  const more = Object.entries(last.heap!.kinds).map(([kind, count]) => {
    const each = (count - (first.heap!.kinds[kind] ?? 0)) / (last.connections - first.connections);
    return { kind, each };
  });
  const many = more.filter(({ each }) => each > 0.5).toSorted((a, b) => b.each - a.each);
  return many.map(({ kind, each }) => `${each.toFixed(0)} ${kind}`).join(", ");
}

/** Of the straight line that is nearest to the points. */
function slope(points: [number, number][]): number {
  const middle = (at: 0 | 1) => points.reduce((sum, point) => sum + point[at], 0) / points.length;
  const [x, y] = [middle(0), middle(1)];
  const product = points.reduce((sum, point) => sum + (point[0] - x) * (point[1] - y), 0);
  return product / points.reduce((sum, point) => sum + (point[0] - x) ** 2, 0);
}

/** Resident memory of the workers that is no file's: not Bun itself. */
function ownBytes(server: Server): number {
  const resident = server.workers().map((pid) => {
    const status = readFileSync(`/proc/${pid}/status`, "utf8");
    return Number(/RssAnon:\s+(\d+) kB/.exec(status)?.[1]) * 1024;
  });
  return resident.reduce((a, b) => a + b, 0);
}

// ---------------------------------------------------------------------------------------------------- flood

async function flood(root: string): Promise<void> {
  await using server = await startServer(root, ["--max-connections", String(FLOOD_LIMIT)]);
  const rates: number[] = [];
  const shares = { before: [] as number[], during: [] as number[], after: [] as number[] };
  const served: number[] = [];
  for (let round = 0; round < ROUNDS; round++) {
    await server.run("small");
    shares.before.push(await processorShare(server, 1000));
    rates.push(await floodOnce(server, shares.during));
    shares.after.push(await processorShare(server, 1000));
    // Once more, because a client that looks takes time of the server's too.
    await floodOnce(server, []);
    served.push(await server.run("small"));
  }
  const rate = formatCount(median(rates));
  console.log(`A flood of ${rate} connections a second for ${FLOOD_MS / 1000} s, ${FLOOD_LIMIT} allowed, medians`);
  console.log(`of ${ROUNDS} rounds:\n`);
  console.log("| the server's share of a processor: before | meanwhile | in the second after, far below 1 |");
  console.log("|---|---|---|");
  console.log(`| ${Object.values(shares).map(median).map(formatShare).join(" | ")} |`);
  const [middle, most] = [formatMs(median(served)), formatMs(Math.max(...served))];
  console.log(`\nA client that comes at its end is served within ${middle}, at most ${most}; at most 1000 ms.`);
}

/** Returns how many connections a second there were. */
async function floodOnce(server: Server, shares: number[]): Promise<number> {
  await using peers = startPeers(server.port);
  const flooding = peers.order({ floodMs: FLOOD_MS });
  shares.push(await processorShare(server, FLOOD_MS));
  const { connections } = await flooding;
  return (connections * 1000) / FLOOD_MS;
}

// ---------------------------------------------------------------------------------------------------- run

const formatMs = (seconds: number) => `${(seconds * 1000).toFixed(0)} ms`;
const formatShare = (share: number) => share.toFixed(2);

async function main(): Promise<void> {
  const parts = options.only ? [options.only] : Object.keys(PARTS);
  if (!parts.every((name) => name in PARTS)) throw new Error(`--only takes one of ${Object.keys(PARTS).join(", ")}`);
  printVersions({});
  console.log(`${cpus().length} cores, ${cpus()[0]?.model}\n`);
  using folder = temporaryFolder();
  for (const [name, size] of [
    ["normal", SIZE],
    ["small", SMALL_BYTES],
    ["large", SIZE],
  ] as const)
    writeLargeFile(join(folder.path, name), size);
  for (const name of parts) {
    await PARTS[name]!(folder.path);
    console.log();
  }
}

if (import.meta.main) await main();
