/**
 * One client of the soak after another: what a lane has its clients do, and what must be true when one says that it is
 * done. See soak.ts.
 *
 * A lane has a folder of its own and takes one task at a time: a transfer that is run until it has ended well, however
 * often its process is killed or gives up. The tasks follow from the seed, the lane's number and the task's, and not from
 * what happens meanwhile, so that the same seed has the same tasks in the same order.
 */
import { mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import type { Subprocess } from "bun";
import { ExitStatus } from "../../protocol.ts";
import { isUnfinished } from "../../resume.ts";
import { randomBytes, seeded, spawnClient } from "../fixtures.ts";

/** A task that has not ended well after so many runs of the client never will. */
const MAX_RUNS = 60;
/** A client that runs for longer than this hangs: every wait of it has a limit. */
const HANG_MS = 120_000;
const MIB = 2 ** 20;
const SMALL_FILES = 30;
/** After these the same command is typed again: lost, server error, damage that stayed, changed again and again. */
const GIVEN_UP: ReadonlySet<number> = new Set([
  ExitStatus.lost,
  ExitStatus.server,
  ExitStatus.checksum,
  ExitStatus.changed,
]);

type Random = ReturnType<typeof seeded>;

// ---------------------------------------------------------------------------------------------------- versions

interface Version {
  digest: string;
  startedAt: number;
  /** When it was acknowledged. */
  doneAt: number;
}

/** Which content each of the server's files may have: all that was put there, and is not known to be replaced. */
export class Versions {
  readonly #byPath = new Map<string, Version[]>();

  /** From now on a file may have this content; returns what is called once it has it for sure. */
  begin(path: string, content: Uint8Array): () => void {
    const version = { digest: digestOf(content), startedAt: performance.now(), doneAt: Number.POSITIVE_INFINITY };
    this.#byPath.set(path, [...(this.#byPath.get(path) ?? []), version]);
    return () => {
      version.doneAt = performance.now();
    };
  }

  /** Whether a file that was read after `since` may have been this. */
  isPossible(path: string, digest: string, since: number): boolean {
    const versions = this.#byPath.get(path) ?? [];
    const isReplaced = ({ doneAt }: Version) =>
      versions.some((other) => other.startedAt > doneAt && other.doneAt <= since);
    return versions.some((version) => version.digest === digest && !isReplaced(version));
  }

  /** Whether there must be a file of that name. */
  isThere(path: string, since: number): boolean {
    return (this.#byPath.get(path) ?? []).some(({ doneAt }) => doneAt <= since);
  }

  get paths(): string[] {
    return [...this.#byPath.keys()];
  }
}

export function digestOf(content: Uint8Array): string {
  return new Bun.CryptoHasher("sha256").update(content).digest("hex");
}

// ---------------------------------------------------------------------------------------------------- world

/** What all lanes share. */
export interface World {
  readonly seed: number;
  /** What is served. */
  readonly root: string;
  /** Where the lanes have their folders. */
  readonly home: string;
  readonly versions: Versions;
  /** How often each thing has happened. */
  readonly counts: Map<string, number>;
  /** Of the server, and of a proxy to it that spoils some connections. */
  readonly addresses: { plain: string; spoilt: string };
  readonly env: Record<string, string>;
  /** No further task is to be begun. */
  isOver(): boolean;
  /** Nor what is begun brought to its end. */
  isAborted(): boolean;
  fault(text: string): void;
}

export function count(world: World, what: string, by = 1): void {
  world.counts.set(what, (world.counts.get(what) ?? 0) + by);
}

/** Gives a served file new content, as an administrator would: in one step. */
function replace({ root, home, versions }: World, path: string, content: Uint8Array): void {
  const temporary = join(home, "next");
  writeFileSync(temporary, content);
  const done = versions.begin(path, content);
  mkdirSync(dirname(join(root, path)), { recursive: true });
  renameSync(temporary, join(root, path));
  done();
}

const LARGE = ["large0", "large1", "large2"];
const smallNames = Array.from({ length: SMALL_FILES }, (_, index) => `d${index % 3}/f${index}`);
const TREE = [...smallNames, "d0/big"];

const contentFor = (name: string, random: Random) => {
  const most = name.startsWith("large") || name.endsWith("big") ? 12 * MIB : 20_000;
  return randomBytes(1 + random(most), 1 + random(2 ** 31));
};

/** What is there to be fetched. */
export function fillRoot(world: World, lanes: number): void {
  const random = seeded(world.seed);
  for (const path of [...LARGE, ...TREE.map((name) => `tree/${name}`)]) replace(world, path, contentFor(path, random));
  for (let lane = 0; lane < lanes; lane++) mkdirSync(join(world.root, "up", String(lane)), { recursive: true });
}

/** Whether a file on the server is whole, and no older than the last one that was acknowledged. */
export function verifyServed(world: World, path: string): number {
  const since = performance.now();
  const content = readIfThere(join(world.root, path));
  if (!content) {
    if (world.versions.isThere(path, since)) world.fault(`"${path}" was acknowledged and is not on the server`);
    return 0;
  }
  if (!world.versions.isPossible(path, digestOf(content), since))
    world.fault(`"${path}" on the server, ${content.length} bytes, is not what was acknowledged`);
  return content.length;
}

function readIfThere(path: string): Uint8Array | undefined {
  try {
    return readFileSync(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}

// ---------------------------------------------------------------------------------------------------- lane

/** A transfer that is to end well. */
interface Task {
  /** For the table of figures. */
  kind: string;
  args: string[];
  /** What goes on with it after an interruption, besides the same command. */
  resume?: string[];
  stdin?: Uint8Array;
  /** The file need not be there. */
  path?: string;
  /** Once it has: the bytes that were moved. Tells the world what is wrong. */
  check(run: Run): number;
}

interface Run {
  status: number;
  wasKilled: boolean;
  stdout: Uint8Array;
  errors: string;
  startedAt: number;
}

export class Lane {
  readonly #world: World;
  readonly #number: number;
  readonly #folder: string;
  #child: Subprocess | undefined;
  #wasKilled = false;

  constructor(world: World, number: number) {
    this.#world = world;
    this.#number = number;
    this.#folder = join(world.home, `lane${number}`);
    for (const name of ["down", "logs"]) mkdirSync(join(this.#folder, name), { recursive: true });
  }

  /** Takes tasks until it is over. */
  async run(): Promise<void> {
    for (let task = 0; !this.#world.isOver(); task++) {
      const random = seeded(Bun.hash.xxHash32(`${this.#world.seed} ${this.#number} ${task}`));
      await this.#perform(this.#number % 2 === 0 ? this.#download(random) : this.#upload(random), random);
    }
  }

  /** Kills the client that is running; false if there is none. */
  kill(): boolean {
    if (!this.#child || this.#wasKilled) return false;
    this.#wasKilled = true;
    this.#child.kill("SIGKILL");
    return true;
  }

  async #perform(task: Task, random: Random): Promise<void> {
    const { plain, spoilt } = this.#world.addresses;
    const server = random(3) === 0 ? spoilt : plain;
    for (let runs = 1; runs <= MAX_RUNS; runs++) {
      const resumes = runs > 1 && task.resume !== undefined && random(2) === 0;
      const run = await this.#runClient(server, resumes ? task.resume! : task.args, task.stdin);
      if (this.#world.isAborted()) return;
      if (runs > 1) count(this.#world, "runs after the first");
      count(this.#world, "retries within a run", run.errors.split("trying again").length - 1);
      if (run.status === 0 && !resumes) return this.#finish(task, run);
      if (run.status === ExitStatus.notFound && task.path && !this.#world.versions.isThere(task.path, run.startedAt))
        return;
      if (!this.#isAllowed(run, task)) return;
      if (task.kind === "put -" && run.status !== 0) count(this.#world, "streams cut");
    }
    this.#world.fault(`lane ${this.#number}: ${task.args.join(" ")} has not ended well in ${MAX_RUNS} runs`);
  }

  #finish(task: Task, run: Run): void {
    count(this.#world, "bytes", task.check(run));
    count(this.#world, `transfers: ${task.kind}`);
    const left = readdirSync(this.#folder, { recursive: true })
      .map(String)
      .filter((name) => isUnfinished(basename(name)) || basename(name).startsWith(".reprise-"));
    if (left.length > 0) this.#world.fault(`lane ${this.#number}: ${task.args.join(" ")} has left ${left.join(", ")}`);
  }

  /** Whether a run that did not end well may have ended in this way. */
  #isAllowed(run: Run, task: Task): boolean {
    if (run.wasKilled || run.status === 0) return true;
    const isLoud = run.errors.trim() !== "";
    if (GIVEN_UP.has(run.status) && isLoud) return true;
    const what = `lane ${this.#number}: ${task.args.join(" ")} ended with status ${run.status}`;
    this.#world.fault(isLoud ? `${what}: ${run.errors.trim()}` : `${what} and without a word`);
    return false;
  }

  async #runClient(server: string, args: string[], stdin: Uint8Array | undefined): Promise<Run> {
    const startedAt = performance.now();
    const { env } = this.#world;
    const options = { cwd: this.#folder, env, detached: true, ...(stdin ? { stdin } : {}) };
    const child = spawnClient(server, [...args, "--timeout", "4"], options);
    this.#child = child;
    this.#wasKilled = false;
    let hangs = false;
    const watch = setTimeout(() => {
      hangs = true;
      this.kill();
    }, HANG_MS);
    const [stdout, errors, status] = await Promise.all([
      new Response(child.stdout).bytes(),
      new Response(child.stderr).text(),
      child.exited,
    ]);
    clearTimeout(watch);
    if (hangs) this.#world.fault(`lane ${this.#number}: ${args.join(" ")} at ${server} hangs: ${errors.trim()}`);
    this.#child = undefined;
    return { status, wasKilled: this.#wasKilled, stdout, errors, startedAt };
  }

  // ------------------------------------------------------------------------------------------------ downloads

  #download(random: Random): Task {
    const large = LARGE[random(LARGE.length)]!;
    if (random(2) === 0) rmSync(join(this.#folder, "down"), { recursive: true, force: true });
    mkdirSync(join(this.#folder, "down"), { recursive: true });
    switch (random(5)) {
      case 0:
        return this.#get("get", large, [], random);
      case 1:
        return this.#get("get --segments", large, ["--segments", String(2 + random(3))], random);
      case 2:
        return this.#get("get of an upload", `up/${random(4) * 2 + 1}/large${random(2)}`, [], random);
      case 3:
        return this.#cat(large, random);
      default:
        return this.#getTree(random);
    }
  }

  #get(kind: string, path: string, args: string[], random: Random): Task {
    if (LARGE.includes(path)) this.#changeSoon(path, random);
    const file = join(this.#folder, "down", basename(path));
    const check = ({ startedAt }: Run) => this.#verify(path, readIfThere(file), startedAt);
    return { kind, path, args: ["get", path, "-d", "down", ...args], resume: ["resume", "-d", "down"], check };
  }

  #cat(path: string, random: Random): Task {
    this.#changeSoon(path, random);
    const check = ({ stdout, startedAt }: Run) => this.#verify(path, stdout, startedAt);
    return { kind: "cat", args: ["cat", path], check };
  }

  #getTree(random: Random): Task {
    for (let changes = random(6); changes > 0; changes--) {
      const path = `tree/${TREE[random(TREE.length)]}`;
      replace(this.#world, path, contentFor(path, random));
    }
    const check = ({ startedAt }: Run) =>
      TREE.map((name) => `tree/${name}`)
        .map((path) => this.#verify(path, readIfThere(join(this.#folder, "down", path)), startedAt))
        .reduce((sum, bytes) => sum + bytes);
    const args = random(2) === 0 ? ["get", "-r", "tree", "-d", "down"] : ["sync", "tree", "down/tree"];
    return { kind: `${args[0]} of a folder`, args, check };
  }

  #verify(path: string, content: Uint8Array | undefined, startedAt: number): number {
    const isRight = content && this.#world.versions.isPossible(path, digestOf(content), startedAt);
    if (!isRight) this.#world.fault(`lane ${this.#number}: "${path}" came as no version of the server's`);
    return content?.length ?? 0;
  }

  /** Once in a while the file becomes another while it is on its way. */
  #changeSoon(path: string, random: Random): void {
    const [isDue, wait_ms, content] = [random(3) === 0, random(1_500), contentFor(path, random)];
    if (isDue) setTimeout(() => this.#world.isOver() || replace(this.#world, path, content), wait_ms);
  }

  // ------------------------------------------------------------------------------------------------ uploads

  #upload(random: Random): Task {
    const own = `up/${this.#number}`;
    switch (random(5)) {
      case 0:
        return this.#put("put", `${own}/small${random(2)}`, random);
      case 1:
        return this.#put("put", `${own}/large${random(2)}`, random);
      case 2:
        return this.#put("put where others put", `up/large-of-all`, random);
      case 3:
        return this.#putStream(`${own}/large-stream`, random);
      default:
        return this.#putTree(own, random);
    }
  }

  #put(kind: string, path: string, random: Random): Task {
    const content = contentFor(basename(path), random);
    const file = basename(path);
    writeFileSync(join(this.#folder, file), content);
    const args = ["put", file, "-t", path, "-d", "logs"];
    return { kind, args, resume: ["resume", "-d", "logs"], check: this.#acknowledging([[path, content]]) };
  }

  #putStream(path: string, random: Random): Task {
    const content = contentFor(basename(path), random);
    const args = ["put", "-", "-t", path, "--size", String(content.length)];
    return { kind: "put -", args, stdin: content, check: this.#acknowledging([[path, content]]) };
  }

  #putTree(own: string, random: Random): Task {
    const folder = join(this.#folder, "tree");
    const changes: [string, Uint8Array][] = [];
    for (const name of TREE) {
      const isThere = readIfThere(join(folder, name)) !== undefined;
      const isDue = random(6) === 0;
      if (isThere && !isDue) continue;
      const content = contentFor(name, random);
      mkdirSync(dirname(join(folder, name)), { recursive: true });
      writeFileSync(join(folder, name), content);
      changes.push([`${own}/tree/${name}`, content]);
    }
    const args =
      random(2) === 0 ? ["put", "-r", "tree", "-t", own, "-d", "logs"] : ["sync", `${own}/tree`, "tree", "--up"];
    if (args[0] === "sync") args.push("-d", "logs");
    return { kind: `${args[0]} of a folder to the server`, args, check: this.#acknowledging(changes) };
  }

  /** From now on the server may have these; once the task has ended well it must. */
  #acknowledging(changes: [string, Uint8Array][]): () => number {
    const done = changes.map(([path, content]) => this.#world.versions.begin(path, content));
    return () => {
      for (const tell of done) tell();
      return changes.reduce((sum, [path]) => sum + verifyServed(this.#world, path), 0);
    };
  }
}
