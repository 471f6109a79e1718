/**
 * A cluster of real processes under faults: a master and three members, or three equals whose ledger three members of etcd
 * keep, while writers change files through all of them and readers read.
 *
 * ```sh
 * bun run soak:cluster --minutes 10              # prints its seed first
 * bun run soak:cluster --minutes 10 --seed 7     # the same changes and the same faults again, in the same order
 * bun run soak:cluster --etcd                    # equals
 * bun run soak:cluster --etcd --single           # one node or one member of etcd is killed at a time
 * ```
 *
 * Supervisors, workers and keepers are killed with -9 and started again, whole nodes are stopped for seconds and go on, the
 * disk of one member is full for a while, a member of etcd is killed; see writers.ts for who changes what meanwhile, and
 * readers.ts for who reads. Then the faults stop, and all trees must become the same, with every change in them that was
 * acknowledged. Which fault meets whom and when follows from the seed; where in its work that finds it is up to the machine.
 * `--single`: each has come back before the next is killed, so that all but one are always there.
 *
 * Ends with a table of figures, and with status 1 when anything was wrong; what is on disk is then kept.
 */
import {
  cpSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  realpathSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";
import { type Cluster, type Node, startCluster } from "../clusters.ts";
import { type Etcd, startEtcd } from "../engines.ts";
import {
  isAlive,
  killHard,
  mountSmall,
  type Server,
  seeded,
  signal,
  temporaryFolder,
  treeOf,
  waitFor,
} from "../fixtures.ts";
import { filesToRead, Reader } from "./readers.ts";
import { ClientWriter, digestOf, FileWriter, foldersFor, History, type World } from "./writers.ts";

/** The master first. */
const NODES = ["A", "B", "C", "D"];
/** And where none is. */
const EQUALS = ["A", "B", "C"];
const ETCD_MEMBERS = 3;
const WRITERS = 4;
const READERS = 4;
/** Of so many faults one meets etcd. */
const ETCD_SHARE = 6;
/** Room on the member whose disk gets full. */
const SMALL_DISK = "512M";
const BLOCK_BYTES = 1024 * 1024;
/** All must be the same so soon after the last fault: long, since nothing passes by waiting. */
const SETTLE_MS = 120_000;
const PROGRESS_MS = 20_000;
/** What a server says of itself that it should never have to. */
const BUG = /"event":"bug"|internal error|^panic|Segmentation fault/;

export interface ChaosOptions {
  seed: number;
  seconds: number;
  /** What keeps the ledger. */
  engine: "master" | "etcd";
  /** Each of those that are killed is back before the next: a whole node, or a member of etcd. */
  isSingle?: boolean;
  /** Between two faults, at the least and at the most. */
  pauseMs: [number, number];
  /** Told of progress and of each thing that is wrong at once. */
  say: (line: string) => void;
}

export interface Report {
  seed: number;
  /** What is wrong. */
  problems: string[];
  figures: [string, string][];
  faults: number;
}

type Fault = "supervisor" | "worker" | "keeper" | "stop" | "full disk" | "node";

/** Runs all of it, to the end and its last checks. */
export async function chaos(options: ChaosOptions): Promise<Report> {
  const run = new Chaos(options);
  try {
    await run.run();
  } catch (error) {
    run.fault(`the test itself failed: ${error instanceof Error ? error.stack : error}`);
  }
  return run.end();
}

class Chaos implements World {
  readonly seed: number;
  readonly home: string;
  readonly history = new History();
  readonly env: Record<string, string>;
  readonly master: string | undefined;
  readonly #names: string[];
  readonly #options: ChaosOptions;
  readonly #folder = temporaryFolder();
  readonly #problems: string[] = [];
  readonly #counts = new Map<string, number>();
  readonly #startedAt = performance.now();
  /** All that have run, each with what it logged. */
  readonly #servers: Server[] = [];
  /** What a fault has hold of. */
  readonly #busy = new Set<Node | Etcd>();
  readonly #running = new Set<Promise<void>>();
  #lastFault = "no fault yet";
  #pauses: number[] = [];
  #etcd: Etcd | undefined;
  #disk: ReturnType<typeof mountSmall>;
  #cluster!: Cluster;
  #isOver = false;

  constructor(options: ChaosOptions) {
    this.#options = options;
    this.seed = options.seed;
    this.#names = options.engine === "etcd" ? EQUALS : NODES;
    this.master = options.engine === "etcd" ? undefined : NODES[0];
    this.home = join(this.#folder.path, "writers");
    mkdirSync(this.home);
    // What all processes inherit, and are found by at the end.
    this.env = { REPRISE_CHAOS: this.#folder.path };
  }

  get addresses(): ReadonlyMap<string, string> {
    return new Map(this.#cluster.nodes.map(({ name, server }) => [name, server.address]));
  }

  isOver(): boolean {
    return this.#isOver;
  }

  count(what: string): void {
    this.#counts.set(what, (this.#counts.get(what) ?? 0) + 1);
  }

  fault(text: string): void {
    this.#problems.push(text);
    this.#options.say(`wrong after ${this.#seconds()} s: ${text}`);
  }

  say(text: string): void {
    this.#options.say(`${this.#seconds()} s: ${text}`);
  }

  /** The machine has a part in it: no fault. */
  paused(ms: number): void {
    this.#pauses.push(ms);
    const longest = `longest pause of reads, ms (${this.#lastFault})`;
    this.#counts.set(longest, Math.max(this.#counts.get(longest) ?? 0, Math.round(ms)));
  }

  async run(): Promise<void> {
    await this.#start();
    const { nodes } = this.#cluster;
    const writers = Array.from({ length: WRITERS }, (_, number) => new ClientWriter(this, number));
    const readers = Array.from({ length: READERS }, (_, number) => new Reader(this, number));
    // Not where the disk gets full.
    const { name, root } = nodes.at(-2)!;
    const outside = new FileWriter(this, name, root);
    const timer = setInterval(() => this.#progress(), PROGRESS_MS);
    const working = Promise.all([...writers, ...readers, outside].map((one) => one.run()));
    const disturbed = this.#options.isSingle ? this.#disturbSingly() : this.#disturb();
    try {
      await Promise.race([disturbed, working]);
    } finally {
      this.#isOver = true;
      clearInterval(timer);
      await Promise.allSettled([working, disturbed]);
      await Promise.all(this.#running);
    }
    await working;
    await this.#checkRest();
  }

  async end(): Promise<Report> {
    if (this.#problems.length > 0) this.#keepTrees();
    try {
      await this.#cluster?.[Symbol.asyncDispose]();
    } catch (error) {
      this.fault(`a server does not end: ${error}`);
    }
    await this.#etcd?.[Symbol.asyncDispose]();
    await this.#checkOrphans();
    this.#checkLogs();
    if (this.#problems.length > 0) this.#keepHistory();
    this.#disk?.[Symbol.dispose]();
    if (this.#problems.length === 0) this.#folder[Symbol.dispose]();
    const faults = [...this.#counts].filter(([what]) => what.startsWith("fault: "));
    return {
      seed: this.seed,
      problems: this.#problems,
      figures: this.#figures(),
      faults: faults.reduce((sum, [, times]) => sum + times, 0),
    };
  }

  /** To be looked at afterwards. */
  #keepTrees(): void {
    for (const { root, name } of this.#cluster?.nodes ?? [])
      cpSync(realpathSync(root), join(this.#folder.path, "trees", name), { recursive: true, preserveTimestamps: true });
  }

  #keepHistory(): void {
    writeFileSync(join(this.#folder.path, "history"), String(this.history));
    for (const [number, server] of this.#servers.entries())
      writeFileSync(join(this.#folder.path, `server-${number}.log`), `${server.address}\n${server.stderr()}`);
  }

  /** The last member has a small disk, where there can be one. */
  async #start(): Promise<void> {
    const args = ["--writable", "--keep-free", "1M"];
    const toRead = filesToRead();
    this.history.begin(
      Object.entries(toRead).map(([path, content]) => [path, digestOf(content)]),
      true,
      "the start",
    )();
    if (this.#options.engine === "etcd") this.#etcd = await startEtcd({ members: ETCD_MEMBERS });
    this.#cluster = await startCluster({
      replicas: this.#names.length - 2,
      args,
      env: this.env,
      files: { ...foldersFor(WRITERS, this.#names), ...toRead },
      ledger: this.#etcd?.url("chaos"),
    });
    this.#disk = process.getuid?.() === 0 ? mountSmall(SMALL_DISK) : undefined;
    if (this.#disk) {
      const root = join(this.#disk.path, "root");
      mkdirSync(root);
      symlinkSync(root, join(dirname(this.#cluster.master.root), this.#names.at(-1)!));
    }
    await this.#cluster.add();
    await this.#cluster.live();
    // What is there at the start is no change that could be late.
    await this.#cluster.settled();
    this.#servers.push(...this.#cluster.nodes.map(({ server }) => server));
  }

  // ------------------------------------------------------------------------------------------------ faults

  async #disturb(): Promise<void> {
    const random = seeded(this.seed);
    const [least, most] = this.#options.pauseMs;
    while (this.#isTimeLeft) {
      await Bun.sleep(least + random(most - least));
      const node = this.#cluster.nodes[random(this.#names.length)]!;
      const fault = this.#faultFor(random(100));
      const duration = 1_000 + random(6_000);
      const victim = fault === "full disk" ? this.#cluster.nodes.at(-1)! : node;
      const choice = random(2);
      if (this.#etcd && random(ETCD_SHARE) === 0) this.#beginAtEtcd(random(ETCD_MEMBERS), duration);
      else this.#begin(fault, victim, () => this.#inflict(fault, victim, duration, choice));
    }
  }

  /** All six in turn, as the seed mixes them. */
  async #disturbSingly(): Promise<void> {
    const random = seeded(this.seed);
    const [least, most] = this.#options.pauseMs;
    const victims = [...this.#cluster.nodes, ...(this.#etcd ? Array(ETCD_MEMBERS).keys() : [])];
    for (let left = [...victims]; this.#isTimeLeft; left = left.length > 0 ? left : [...victims]) {
      await Bun.sleep(least + random(most - least));
      const [victim] = left.splice(random(left.length), 1);
      const duration = 1_000 + random(6_000);
      if (typeof victim === "number") this.#beginAtEtcd(victim, duration);
      else this.#begin("node", victim!, () => this.#inflict("node", victim!, duration, 0));
      await Promise.all(this.#running);
      await this.#cluster.live();
    }
  }

  get #isTimeLeft(): boolean {
    return !this.#isOver && performance.now() - this.#startedAt < this.#options.seconds * 1000;
  }

  #faultFor(percent: number): Fault {
    if (percent < 22) return "supervisor";
    if (percent < 44) return "worker";
    if (percent < 64) return "keeper";
    return percent < 82 || !this.#disk ? "stop" : "full disk";
  }

  /** One member at a time, so that two can go on. */
  #beginAtEtcd(member: number, ms: number): void {
    const etcd = this.#etcd!;
    this.#begin("etcd", etcd, async () => {
      await etcd.kill(member);
      await Bun.sleep(ms / 2);
      await etcd.restart(member);
    });
  }

  #begin(fault: Fault | "etcd", victim: Node | Etcd, work: () => Promise<void>): void {
    if (this.#busy.has(victim)) return;
    this.count(`fault: ${fault}`);
    this.#lastFault = fault;
    this.#busy.add(victim);
    const running = work()
      .catch((error) => this.fault(`${fault}${"name" in victim ? ` of ${victim.name}` : ""}: ${error.stack}`))
      .finally(() => {
        this.#busy.delete(victim);
        this.#running.delete(running);
      });
    this.#running.add(running);
  }

  async #inflict(fault: Fault, node: Node, ms: number, choice: number): Promise<void> {
    const children = node.server.workers();
    const keeper = children.find(isKeeper);
    switch (fault) {
      case "node":
        for (const pid of [node.server.process.pid, ...children]) killHard(pid);
        await node.kill();
        await Bun.sleep(ms / 2);
        return this.#startAgain(node);
      case "supervisor":
        await node.kill();
        await Bun.sleep(ms / 2);
        return this.#startAgain(node);
      case "worker": {
        const workers = children.filter((pid) => pid !== keeper);
        return killHard(workers[choice % workers.length] ?? node.server.process.pid);
      }
      case "keeper":
        if (keeper !== undefined) killHard(keeper);
        return;
      case "stop":
        return stopFor([node.server.process.pid, ...children], ms);
      case "full disk":
        return this.#fillFor(ms, choice === 0 ? 0 : BLOCK_BYTES / 2);
    }
  }

  /** What has connected meanwhile may have the port as its own end. */
  async #startAgain(node: Node): Promise<void> {
    await waitFor(`${node.name} has its port again`, () =>
      node.start().then(
        () => true,
        (error) => {
          if (!String(error).includes("is taken")) throw error;
          return false;
        },
      ),
    );
    this.#servers.push(node.server);
  }

  /** Takes all room, but so many bytes. */
  async #fillFor(ms: number, spare: number): Promise<void> {
    const folder = join(this.#disk!.path, "filler");
    mkdirSync(folder);
    try {
      for (let number = 0; ; number++) {
        writeFileSync(join(folder, String(number)), new Uint8Array(BLOCK_BYTES));
        // Those who read are in this process.
        await Bun.sleep(0);
      }
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "ENOSPC") throw error;
    }
    if (spare > 0) writeFileSync(join(folder, "0"), new Uint8Array(BLOCK_BYTES - spare));
    await Bun.sleep(ms);
    rmSync(folder, { recursive: true });
  }

  // ------------------------------------------------------------------------------------------------ last checks

  async #checkRest(): Promise<void> {
    const { nodes } = this.#cluster;
    const since = performance.now();
    const tree = await this.#settled();
    this.#counts.set("ms until all were the same", Math.round(performance.now() - since));
    if (!tree) return this.#tellUnsettled();
    for (const fault of this.history.faultsOf(tree)) this.fault(fault);
    for (const line of tree.filter((line) => /(^|\/)(\.reprise|[^ ]*\.part )/.test(line)))
      this.fault(`a temporary file is left: ${line}`);
    for (const node of nodes) {
      const { problem, replicas } = await node.status();
      const behind = replicas.filter(({ state, lag }) => state !== "live" || lag > 0);
      if (problem !== undefined || behind.length > 0)
        this.fault(`${node.name} has a problem: ${problem ?? JSON.stringify(behind)}`);
    }
    this.#counts.set("entries of the tree", tree.length);
    this.#counts.set("conflict copies", tree.filter((line) => line.includes(".conflict-")).length);
  }

  /** The tree that all have. */
  async #settled(): Promise<string[] | undefined> {
    const end = performance.now() + SETTLE_MS;
    while (performance.now() < end) {
      const tree = await this.#cluster
        .live()
        .then(() => this.#cluster.settled())
        .catch(() => undefined);
      if (tree) return tree;
    }
    return undefined;
  }

  async #tellUnsettled(): Promise<void> {
    const { nodes, master } = this.#cluster;
    this.fault(`the trees are not the same ${SETTLE_MS / 1000} s after the last fault`);
    const right = treeOf(master.root);
    for (const { name, root, status } of nodes) {
      const there = treeOf(root);
      const missing = right.filter((line) => !there.includes(line)).slice(0, 10);
      const more = there.filter((line) => !right.includes(line)).slice(0, 10);
      const said = await status().catch((error) => ({ problem: String(error), revision: undefined, replicas: [] }));
      const { problem, revision, replicas } = said;
      this.fault(`${name} says ${JSON.stringify({ problem, revision, replicas })}, lacks ${missing}, has ${more}`);
    }
  }

  /** Keepers that have ended by themselves, and what nobody should have to say. */
  #checkLogs(): void {
    const bugs = this.#servers.flatMap((server) =>
      server
        .stderr()
        .split("\n")
        .filter((line) => BUG.test(line)),
    );
    for (const bug of new Set(bugs)) this.fault(`a server said: ${bug}`);
    const ends = (status: string) =>
      this.#servers.flatMap(({ log }) => log.filter((line) => line.event === "keeper" && line.status === status))
        .length;
    const [restarts, full, kills] = [ends("restarted"), ends("no_room"), this.#counts.get("fault: keeper") ?? 0];
    if (restarts > kills + full) this.fault(`keepers: ${kills} killed, ${full} without room, ${restarts} restarted`);
  }

  async #checkOrphans(): Promise<void> {
    const none = () => this.#orphans().length === 0;
    if (await waitFor("all processes are gone", none).catch(() => false)) return;
    this.fault(`left behind: process ${this.#orphans().join(", ")}`);
    for (const pid of this.#orphans()) killHard(pid);
  }

  #orphans(): number[] {
    const pids = readdirSync("/proc").filter((name) => /^\d+$/.test(name));
    return pids.map(Number).filter((pid) => isAlive(pid) && hasVariable(pid, `REPRISE_CHAOS=${this.#folder.path}`));
  }

  // ------------------------------------------------------------------------------------------------ figures

  get #pausesOfReads(): string {
    const sorted = this.#pauses.toSorted((a, b) => a - b).map(Math.round);
    return sorted.length === 0 ? "none" : `${sorted[sorted.length >> 1]}, ${sorted.at(-1)}`;
  }

  #seconds(): number {
    return Math.round((performance.now() - this.#startedAt) / 1000);
  }

  #progress(): void {
    const { acknowledged } = this.history;
    this.#options.say(`${this.#seconds()} s: ${acknowledged} changes acknowledged, ${this.#problems.length} wrong`);
  }

  #figures(): [string, string][] {
    return [
      ["seed", String(this.seed)],
      ["time", `${this.#seconds()} s`],
      ["changes acknowledged", String(this.history.acknowledged)],
      ["pauses of reads, ms: median, longest", this.#pausesOfReads],
      ...[...this.#counts].sort().map(([what, times]): [string, string] => [what, String(times)]),
      ...(this.#problems.length > 0 ? [["kept in", this.#folder.path] as [string, string]] : []),
    ];
  }
}

async function stopFor(pids: number[], ms: number): Promise<void> {
  const signalAll = (name: "SIGSTOP" | "SIGCONT") => {
    for (const pid of pids) signal(pid, name);
  };
  signalAll("SIGSTOP");
  await Bun.sleep(ms);
  signalAll("SIGCONT");
}

function isKeeper(pid: number): boolean {
  return hasVariable(pid, "REPRISE_KEEPER=");
}

/** Whether a process was started with a variable that begins so. */
function hasVariable(pid: number, start: string): boolean {
  try {
    const variables = readFileSync(`/proc/${pid}/environ`, "utf8").split("\0");
    return variables.some((variable) => variable.startsWith(start));
  } catch {
    // It has gone, or is somebody else's.
    return false;
  }
}

function optionsFrom(words: string[]): ChaosOptions {
  const numberOf = (name: string) => {
    const at = words.indexOf(`--${name}`);
    return at < 0 ? undefined : Number(words[at + 1]);
  };
  const seconds = (numberOf("minutes") ?? 2) * 60;
  const seed = numberOf("seed") ?? Math.floor(Math.random() * 1e6);
  const engine = words.includes("--etcd") ? "etcd" : "master";
  const isSingle = words.includes("--single");
  return { seed, seconds, engine, isSingle, pauseMs: [200, 2_500], say: (line) => console.log(line) };
}

if (import.meta.main) {
  const options = optionsFrom(process.argv.slice(2));
  console.log(`seed ${options.seed}`);
  const { figures, problems } = await chaos(options);
  for (const [what, figure] of figures) console.log(`${what.padEnd(44)} ${figure}`);
  process.exitCode = problems.length > 0 ? 1 : 0;
}
