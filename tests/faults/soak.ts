/**
 * The soak: eight clients download and upload while clients, workers and whole servers are killed at random moments.
 *
 * ```sh
 * bun run soak --minutes 10              # prints its seed first
 * bun run soak --minutes 10 --seed 7     # the same tasks and the same kills again, in the same order
 * bun run soak --kills 200 --clients 4
 * ```
 *
 * The clients are real processes, some of them behind a proxy that delays, cuts, damages and stalls: see lane.ts. Checked
 * all the time: what was downloaded is a version that the server held, what was acknowledged is there, nobody is left
 * behind, service comes back. Which process is killed and when follows from the seed; where in its work that finds it is up
 * to the machine, so that a replay meets the same faults with luck, and others of their kind without.
 *
 * Ends with a table of figures, and with status 1 when anything was wrong; what is on disk is then kept. Ctrl-C ends it
 * early, in the same way.
 */
import { mkdirSync, readdirSync, readFileSync, readlinkSync } from "node:fs";
import { join } from "node:path";
import { Remote } from "../../remote.ts";
import {
  isAlive,
  killHard,
  residentBytes,
  type Server,
  seeded,
  startServer,
  temporaryFolder,
  waitFor,
} from "../fixtures.ts";
import { count, fillRoot, Lane, Versions, verifyServed, type World } from "./lane.ts";
import { type Faults, startProxy, type Wire } from "./proxy.ts";

/** Of one connection, so that the kills find transfers under way. */
const LIMIT_RATE = "12M";
/** Service must be back by then after a kill, unless it is said otherwise. */
const BACK_MS = 2_000;
const SAMPLE_MS = 500;
const PROGRESS_MS = 20_000;
/** Of every 36 kills the last 12 hit clients only, so that a worker gets old enough to be seen growing. */
const PHASE = { kills: 36, clientsFrom: 24 };
/** An idle worker may have so many descriptors more than a new one. */
const SPARE_DESCRIPTORS = 8;

export interface SoakOptions {
  seed: number;
  /** It ends when either is reached. */
  minutes: number;
  kills: number;
  clients: number;
  /** Between two kills, at the least and at the most. */
  pauseMs: [number, number];
  /** Longer without service after a kill is a fault. */
  backMs: number;
  /** Told of progress and of each fault at once. */
  say: (line: string) => void;
  /** Aborted: it ends as when its time is over. */
  signal?: AbortSignal | undefined;
}

export interface Report {
  seed: number;
  faults: string[];
  figures: [string, string][];
  kills: number;
}

/** Runs all of it, to the end and its last checks. */
export async function soak(options: SoakOptions): Promise<Report> {
  const run = new Soak(options);
  try {
    await run.run();
  } catch (error) {
    run.fault(`the soak itself failed: ${error instanceof Error ? error.stack : error}`);
  }
  return run.end();
}

type Victim = "client" | "worker" | "both workers" | "server";

class Soak implements World {
  readonly seed: number;
  readonly root: string;
  readonly home: string;
  readonly versions = new Versions();
  readonly counts = new Map<string, number>();
  readonly env: Record<string, string>;
  readonly #options: SoakOptions;
  readonly #folder: ReturnType<typeof temporaryFolder>;
  readonly #faults: string[] = [];
  readonly #kills = new Map<Victim, number>();
  /** The longest times without service, by what was killed, and the longest that a worker outlived its supervisor. */
  readonly #longestMs = new Map<string, number>();
  readonly #workers = new Map<number, Sample[]>();
  readonly #startedAt = performance.now();
  readonly #lanes: Lane[];
  #server!: Server;
  #proxy!: Wire;
  #newDescriptors = 0;
  #isOver = false;
  #isAborted = false;
  #sampledAt = performance.now();
  /** By which the soak itself has been late, on a machine that has too much to do: no wait is measured better. */
  #lateMs = 0;

  constructor(options: SoakOptions) {
    this.#options = options;
    this.seed = options.seed;
    this.#folder = temporaryFolder();
    this.root = join(this.#folder.path, "root");
    this.home = join(this.#folder.path, "lanes");
    for (const folder of [this.root, this.home]) mkdirSync(folder);
    // What all processes inherit, and are found by at the end.
    this.env = { REPRISE_SOAK: this.#folder.path };
    fillRoot(this, options.clients);
    this.#lanes = Array.from({ length: options.clients }, (_, number) => new Lane(this, number));
  }

  get addresses() {
    return { plain: this.#server.address, spoilt: this.#proxy.address };
  }

  isOver(): boolean {
    return this.#isOver;
  }

  isAborted(): boolean {
    return this.#isAborted;
  }

  fault(text: string): void {
    this.#faults.push(text);
    this.#options.say(`fault after ${this.#seconds()} s: ${text}`);
  }

  async run(): Promise<void> {
    this.#server = await this.#startServer(0);
    this.#newDescriptors = Math.max(...this.#server.workers().map(descriptorsOf));
    this.#proxy = startProxy({ target: this.#server.port, spoil: (connection) => this.#spoil(connection) });
    this.#sampledAt = performance.now();
    const timers = [setInterval(() => this.#sample(), SAMPLE_MS), setInterval(() => this.#progress(), PROGRESS_MS)];
    const working = Promise.all(this.#lanes.map((lane) => lane.run()));
    try {
      await Promise.race([this.#killAll(), working]);
    } catch (error) {
      this.#isAborted = true;
      for (const lane of this.#lanes) lane.kill();
      throw error;
    } finally {
      this.#isOver = true;
      await working;
      for (const timer of timers) clearInterval(timer);
    }
    await this.#checkRest();
  }

  /** Stops what runs, looks for what is left of it, and tells. */
  async end(): Promise<Report> {
    this.#proxy?.[Symbol.dispose]();
    // What has outlived its server would keep that one's output open for ever.
    if (this.#isAborted) this.#killRest();
    await this.#server?.[Symbol.asyncDispose]();
    await this.#checkOrphans();
    if (this.#faults.length === 0) this.#folder[Symbol.dispose]();
    else this.#options.say(`what is on disk is kept in ${this.#folder.path}`);
    return { seed: this.seed, faults: this.#faults, figures: this.#figures(), kills: this.#killed };
  }

  // ------------------------------------------------------------------------------------------------ kills

  get #killed(): number {
    return [...this.#kills.values()].reduce((sum, kills) => sum + kills, 0);
  }

  async #killAll(): Promise<void> {
    const { kills, minutes, pauseMs, signal } = this.#options;
    const [least, most] = pauseMs;
    const random = seeded(this.seed + 1);
    while (this.#killed < kills && performance.now() - this.#startedAt < minutes * 60_000 && !signal?.aborted) {
      const pause = least + random(most - least);
      const lane = random(this.#lanes.length);
      const victim = this.#victim(random(100));
      await Bun.sleep(pause);
      await this.#kill(victim, lane);
    }
  }

  #victim(percent: number): Victim {
    if (percent < 45 || this.#killed % PHASE.kills >= PHASE.clientsFrom) return "client";
    if (percent < 75) return "worker";
    return percent < 85 ? "both workers" : "server";
  }

  async #kill(victim: Victim, lane: number): Promise<void> {
    this.#kills.set(victim, (this.#kills.get(victim) ?? 0) + 1);
    if (victim === "client") {
      const isKilled = () => this.#lanes.some((_, index) => this.#lanes[(lane + index) % this.#lanes.length]!.kill());
      await waitFor("a client runs", isKilled);
      return;
    }
    const killedAt = performance.now();
    if (victim === "server") await this.#restart();
    else {
      const workers = this.#server.workers();
      const chosen = victim === "worker" ? workers.slice(lane % 2).slice(0, 1) : workers;
      chosen.forEach(killHard);
    }
    await waitFor("there is service again", () => this.#answers());
    this.#took(victim, performance.now() - killedAt);
  }

  /** The supervisor is killed: its workers must go by themselves, and the next one have their port. */
  async #restart(): Promise<void> {
    const { process: supervisor, port } = this.#server;
    const workers = this.#server.workers();
    supervisor.kill("SIGKILL");
    await supervisor.exited;
    const killedAt = performance.now();
    await waitFor("the workers of a killed server are gone", () => workers.every((pid) => !isAlive(pid)));
    const outlived = performance.now() - killedAt;
    this.#longestMs.set("orphans", Math.max(outlived, this.#longestMs.get("orphans") ?? 0));
    this.#collect();
    this.#server = await this.#startServer(port);
  }

  #took(victim: Victim, ms: number): void {
    this.#longestMs.set(victim, Math.max(ms, this.#longestMs.get(victim) ?? 0));
    if (ms > this.#options.backMs) this.fault(`no service for ${Math.round(ms)} ms after the kill of: ${victim}`);
  }

  async #answers(): Promise<boolean> {
    const servers = [{ host: "127.0.0.1", port: this.#server.port }];
    const remote = new Remote({ servers, retries: 0, timeoutMs: 1_000 });
    try {
      return (await remote.status()) !== undefined;
    } catch {
      return false;
    } finally {
      remote.close();
    }
  }

  #startServer(port: number): Promise<Server> {
    const args = ["--writable", "--limit-rate", LIMIT_RATE];
    return startServer(this.root, { port, args, env: this.env, detached: true });
  }

  /** What a server said of itself while it lived. */
  #collect(): void {
    for (const line of this.#server.stderr().split("\n")) {
      if (/"event":"bug"|^error|^panic/.test(line)) this.fault(`the server said: ${line}`);
    }
    count(this, "requests", this.#server.log.length);
  }

  /** A third of the connections have something that befalls them. */
  #spoil(connection: number): { toClient?: Faults; toServer?: Faults } {
    const random = seeded(Bun.hash.xxHash32(`${this.seed} wire ${connection}`));
    const direction = random(2) === 0 ? "toClient" : "toServer";
    // As often among the first kilobytes as in the middle of a large file.
    const at = random(2 ** (1 + random(23)));
    const faults: Faults[] = [{ cutAt: at }, { flipAt: at }, { stallAt: at }, { delay_ms: 1 + random(30) }];
    const chosen = faults[random(12)];
    if (chosen) count(this, `wire: ${Object.keys(chosen)[0]}`);
    return chosen ? { [direction]: chosen } : {};
  }

  // ------------------------------------------------------------------------------------------------ last checks

  /** All lanes have come to their end: what is there now must be all that was promised, and nothing else. */
  async #checkRest(): Promise<void> {
    for (const path of this.versions.paths) verifyServed(this, path);
    const isIdle = (pid: number) => descriptorsOf(pid) <= this.#newDescriptors + SPARE_DESCRIPTORS;
    for (const pid of this.#server.workers()) {
      const settled = await waitFor("descriptors are closed", () => isIdle(pid)).catch(() => false);
      if (!settled)
        this.fault(`an idle worker has ${descriptorsOf(pid)} descriptors, a new one ${this.#newDescriptors}`);
    }
    const status = await this.#server.stop("SIGINT");
    if (status !== 0) this.fault(`the server ended with status ${status} on SIGINT`);
    this.#collect();
    // What dead workers have left is swept when the first worker starts.
    this.#server = await this.#startServer(this.#server.port);
    const staging = () => readdirSync(join(this.root, ".reprise")).filter((name) => name !== "lock");
    const isSwept = () => staging().every((name) => /^put-[0-9a-f]{32}$/.test(name));
    if (!(await waitFor("the sweep is done", isSwept).catch(() => false)))
      this.fault(`.reprise keeps ${staging().join(", ")}`);
    // A stream cannot be gone on with by another process; everything else was.
    const cut = this.counts.get("streams cut") ?? 0;
    const left = staging().length;
    if (left > cut) this.fault(`.reprise keeps ${left} uploads, but only ${cut} streams were cut`);
    this.counts.set("staged uploads of cut streams", left);
  }

  async #checkOrphans(): Promise<void> {
    const none = () => this.#orphans().length === 0;
    if (await waitFor("all processes are gone", none).catch(() => false)) return;
    this.fault(`left behind: process ${this.#orphans().join(", ")}`);
    this.#killRest();
  }

  #killRest(): void {
    this.#orphans().forEach(killHard);
  }

  #orphans(): number[] {
    const pids = readdirSync("/proc").filter((name) => /^\d+$/.test(name));
    return pids.map(Number).filter((pid) => {
      try {
        const mark = `REPRISE_SOAK=${this.#folder.path}`;
        return isAlive(pid) && readFileSync(`/proc/${pid}/environ`, "utf8").split("\0").includes(mark);
      } catch {
        // It has gone, or is somebody else's.
        return false;
      }
    });
  }

  // ------------------------------------------------------------------------------------------------ figures

  async #sample(): Promise<void> {
    const lateMs = performance.now() - this.#sampledAt - SAMPLE_MS;
    this.#sampledAt = performance.now();
    this.#lateMs = Math.max(this.#lateMs, lateMs);
    for (const pid of this.#server.workers()) {
      try {
        const sample = { at: performance.now(), memory: await residentBytes(pid), descriptors: descriptorsOf(pid) };
        if (sample.memory > 0 && sample.descriptors > 0)
          this.#workers.set(pid, [...(this.#workers.get(pid) ?? []), sample]);
      } catch {
        // It has just been killed.
      }
    }
  }

  #progress(): void {
    const transfers = sumOf(this.counts, "transfers: ");
    const said = `${this.#seconds()} s: ${this.#killed} kills, ${transfers} transfers`;
    this.#options.say(`${said}, ${this.#faults.length} faults`);
  }

  #seconds(): number {
    return Math.round((performance.now() - this.#startedAt) / 1000);
  }

  #figures(): [string, string][] {
    const samples = [...this.#workers.values()];
    const oldest = samples.toSorted((a, b) => ageOf(b) - ageOf(a))[0] ?? [];
    const [young, old] = [oldest[Math.floor(oldest.length / 4)], oldest.at(-1)];
    const most = (field: "memory" | "descriptors") => Math.max(0, ...samples.flat().map((sample) => sample[field]));
    return [
      ["seed", String(this.seed)],
      ["time", `${this.#seconds()} s`],
      ["kills", String(this.#killed)],
      ...[...this.#kills].map(([victim, kills]): [string, string] => [`kills: ${victim}`, String(kills)]),
      ["transfers", String(sumOf(this.counts, "transfers: "))],
      ...[...this.counts].sort().map(([what, times]): [string, string] => [what, formatCount(what, times)]),
      ...[...this.#longestMs].map(([what, ms]): [string, string] => [
        what === "orphans" ? "longest life of a worker without its server" : `longest until service after: ${what}`,
        `${Math.round(ms)} ms`,
      ]),
      ["the soak itself was late by at most", `${Math.round(this.#lateMs)} ms`],
      ["memory of a worker, most", formatBytes(most("memory"))],
      ["descriptors of a worker, most", String(most("descriptors"))],
      ["oldest worker: age", `${Math.round(ageOf(oldest) / 1000)} s`],
      ["oldest worker: memory after a quarter and last", `${formatBytes(young?.memory)}, ${formatBytes(old?.memory)}`],
      ["oldest worker: descriptors likewise", `${young?.descriptors}, ${old?.descriptors}`],
      ["faults", String(this.#faults.length)],
    ];
  }
}

interface Sample {
  at: number;
  memory: number;
  descriptors: number;
}

function ageOf(samples: Sample[]): number {
  return samples.length === 0 ? 0 : samples.at(-1)!.at - samples[0]!.at;
}

function descriptorsOf(pid: number): number {
  return readdirSync(`/proc/${pid}/fd`).filter((fd) => {
    try {
      return readlinkSync(`/proc/${pid}/fd/${fd}`) !== "";
    } catch {
      return false;
    }
  }).length;
}

function sumOf(counts: Map<string, number>, prefix: string): number {
  return [...counts].reduce((sum, [what, times]) => sum + (what.startsWith(prefix) ? times : 0), 0);
}

function formatCount(what: string, times: number): string {
  return what === "bytes" ? formatBytes(times) : String(times);
}

function formatBytes(bytes = 0): string {
  return `${(bytes / 1e6).toFixed(0)} MB`;
}

// ---------------------------------------------------------------------------------------------------- main

const NUMBERS = { seed: Bun.hash.crc32(String(Date.now())), minutes: 10, kills: 0, clients: 8, back: BACK_MS };

/** `--name number` for each of `NUMBERS`. */
function readNumbers(args: string[]): typeof NUMBERS {
  const numbers = { ...NUMBERS };
  for (let index = 0; index < args.length; index += 2) {
    const name = args[index]!.replace(/^--/, "") as keyof typeof NUMBERS;
    const value = Number(args[index + 1]);
    if (!(name in NUMBERS) || !(value >= 0)) throw new Error(`Options: --${Object.keys(NUMBERS).join(" N --")} N`);
    numbers[name] = value;
  }
  return numbers;
}

if (import.meta.main) {
  const { seed, minutes, kills, clients, back } = readNumbers(process.argv.slice(2));
  console.log(`seed ${seed}; the same again: bun run soak --minutes ${minutes} --clients ${clients} --seed ${seed}`);
  const stop = new AbortController();
  process.on("SIGINT", () => (stop.signal.aborted ? process.exit(130) : stop.abort()));
  const report = await soak({
    seed,
    minutes,
    kills: kills || Number.POSITIVE_INFINITY,
    clients,
    pauseMs: [200, 2_600],
    backMs: back,
    say: console.log,
    signal: stop.signal,
  });
  const width = Math.max(...report.figures.map(([what]) => what.length));
  for (const [what, figure] of report.figures) console.log(`${what.padEnd(width)}  ${figure}`);
  for (const fault of report.faults) console.error(`fault: ${fault}`);
  if (report.faults.length > 0) {
    console.error(`seed ${seed}: ${report.faults.length} faults`);
    process.exitCode = 1;
  }
}
