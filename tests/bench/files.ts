/**
 * How fast reprise moves many small files next to what a user would take instead, in one run on one machine.
 *
 * ```sh
 * bun run bench:files                          # 10,000 files of 4 KiB, 5 rounds, every part
 * bun run bench:files --only wire --rounds 3   # one part
 * ```
 *
 * Each round runs every contender once, in turn, so that a noisy machine is noisy for all; the medians are compared. A
 * time is that of a whole client process that fills an empty folder. Source and destination are on tmpfs, but for the
 * part `disk`. A first run of each is not timed: what it brought is compared with the source, file by file. A contender
 * that fails is named with what it said, and the others go on. The peers are rsync -a with its daemon,
 * and curl -Z from nginx.
 *
 * Parts: `get`, `put`, `sync` of an unchanged tree, the same over a `wire` with 100 ms of round trip, get and put on a
 * real `disk` (the folder of --disk), put of one `large` file next to its get, and peak `memory` for 100,000 files.
 */
import {
  closeSync,
  existsSync,
  linkSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readSync,
  rmSync,
  statfsSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { cpus } from "node:os";
import { basename, join } from "node:path";
import { formatSize } from "../../command.ts";
import { childrenOf, HOME, peakResidentBytes, randomBytes, temporaryFolder, writeLargeFile } from "../fixtures.ts";
import {
  client,
  findVersions,
  finish,
  firstLine,
  formatCount,
  parseCount,
  parseSize,
  printVersions,
  readOptions,
  start,
  startNginx,
  startRsync,
  Table,
  time,
  type Work,
} from "./bench.ts";
import { startWire } from "./wire.ts";

const options = readOptions({ files: "10000", rounds: "5", size: "2G", disk: "/var/tmp", only: "" });
const FILES = parseCount(options.files);
const ROUNDS = parseCount(options.rounds);
const SIZE = parseSize(options.size);
const FILE_BYTES = 4096;
const FOLDERS = 100;
const WIRE_MS = 50;
const MEMORY_FILES = 100_000;
const MEMORY_FILE_BYTES = 100;
const TMPFS = existsSync("/dev/shm") ? "/dev/shm" : undefined;
/** As statfs(2) names it. */
const TMPFS_MAGIC = 0x01021994;

/** Where our server is, or why there is none. */
type Ours = { port: number } | { failure: string };

/** Between whom a contest is held: a client's folders, and each server's way to the same served folder. */
interface Stage {
  /** For the name of the work: "", " at 100 ms". */
  where: string;
  /** The client's `tree` and `big`. */
  source: string;
  /** Where get and sync make their destinations. */
  local: string;
  /** The served folder, where put and sync --up make theirs. */
  served: string;
  ours: Ours;
  /** Address of the daemon's module. */
  rsync?: string;
  nginx?: number;
  /** What makes rsync sync each file, as reprise does. */
  fsync?: boolean;
  /** Leaves the destinations to the end: removing files keeps a disk busy long after. */
  keep?: boolean;
}

interface Contender {
  name: string;
  /** The command that brings the source into the folder `destination`. Throws when there is no way to. */
  command(destination: string): string[];
}

interface Contest {
  work: Work;
  /** What is brought: `tree` or `big`. */
  name: string;
  /** The folder for the destinations. */
  place: string;
  stage: Stage;
  contenders: Contender[];
  /** Each contender stays with one destination, which an untimed run fills first. */
  unchanged?: boolean;
}

// ---------------------------------------------------------------------------------------------------- trees

function writeTree(path: string, files: number, length: number): void {
  for (let folder = 0; folder < FOLDERS; folder++) mkdirSync(join(path, String(folder)), { recursive: true });
  for (let index = 0; index < files; index++) writeFileSync(pathOf(path, index), randomBytes(length, index + 1));
}

const pathOf = (tree: string, index: number) => join(tree, String(index % FOLDERS), `file-${index}`);

/** How many files lie below `path`, and a digest of their names and content. A file is a tree of one. */
function digestOf(path: string): { files: number; digest: string } {
  const hasher = new Bun.CryptoHasher("sha256");
  const names = statSync(path).isFile() ? [""] : listFiles(path);
  for (const name of names) {
    hasher.update(`${name}\n`);
    hashFile(hasher, join(path, name));
  }
  return { files: names.length, digest: hasher.digest("hex") };
}

function hashFile(hasher: Bun.CryptoHasher, path: string): void {
  const buffer = Buffer.allocUnsafe(2 ** 20);
  const fd = openSync(path, "r");
  let total = 0;
  for (let length = -1; length !== 0; total += length) {
    length = readSync(fd, buffer);
    hasher.update(buffer.subarray(0, length));
  }
  closeSync(fd);
  hasher.update(`${total}\n`);
}

function listFiles(path: string): string[] {
  const found = readdirSync(path, { recursive: true }) as string[];
  return found.filter((name) => !statSync(join(path, name)).isDirectory()).toSorted();
}

function verify(path: string, source: string): void {
  if (!existsSync(path)) throw new Error(`brought no ${basename(path)}`);
  const [found, expected] = [digestOf(path), digestOf(source)];
  if (found.files !== expected.files) throw new Error(`brought ${found.files} files of ${expected.files}`);
  if (found.digest !== expected.digest) throw new Error("brought other names or content");
}

// ---------------------------------------------------------------------------------------------------- contenders

/** Our client at the server of `stage`. */
function reprise(stage: Stage, args: (destination: string) => string[], name = "reprise"): Contender {
  return {
    name,
    command(destination) {
      if ("failure" in stage.ours) throw new Error(stage.ours.failure);
      return client(...args(destination), "-q", "--server", `127.0.0.1:${stage.ours.port}`);
    },
  };
}

/** rsync with the daemon of `stage`, where there is one. */
function rsync(stage: Stage, args: (module: string, destination: string) => string[]): Contender[] {
  const { rsync: module, fsync } = stage;
  if (!module) return [];
  const flags = fsync ? ["-a", "--fsync"] : ["-a"];
  const command = (destination: string) => ["rsync", ...flags, ...args(module, destination)];
  return [{ name: `rsync ${flags.join(" ")}`, command }];
}

/** curl's list of addresses and files: beside the destination, which is to hold nothing else. */
const listOf = (destination: string) => `${destination}.curl`;

/** curl with up to 50 transfers at once, from nginx. */
function curl({ nginx }: Stage): Contender[] {
  if (!nginx) return [];
  const flags = ["-sS", "--fail", "--parallel", "--parallel-max", "50", "--create-dirs"];
  return [
    {
      name: "curl -Z from nginx",
      command(destination) {
        const list = listOf(destination);
        const entry = (name: string) =>
          `url = "http://127.0.0.1:${nginx}/${name}"\noutput = "${destination}/${name}"\n`;
        writeFileSync(list, Array.from({ length: FILES }, (_, index) => entry(pathOf("tree", index))).join(""));
        return ["curl", ...flags, "--config", list];
      },
    },
  ];
}

// ---------------------------------------------------------------------------------------------------- contests

const ofTree = (name: string): Work => ({ name, amount: FILES, unit: "files" });

function get(stage: Stage): Contest {
  const contenders = [
    reprise(stage, (to) => ["get", "-r", "tree", "-d", to]),
    ...rsync(stage, (module, to) => [`${module}/tree`, `${to}/`]),
    ...curl(stage),
  ];
  return { work: ofTree(`get${stage.where}`), name: "tree", place: stage.local, stage, contenders };
}

function put(stage: Stage): Contest {
  const tree = join(stage.source, "tree");
  const contenders = [
    reprise(stage, (to) => ["put", "-r", tree, "-t", basename(to)]),
    ...rsync(stage, (module, to) => [tree, `${module}/${basename(to)}/`]),
  ];
  return { work: ofTree(`put${stage.where}`), name: "tree", place: stage.served, stage, contenders };
}

function syncDown(stage: Stage): Contest {
  const contenders = [
    reprise(stage, (to) => ["sync", "tree", join(to, "tree")]),
    ...rsync(stage, (module, to) => [`${module}/tree/`, `${to}/tree/`]),
  ];
  const work = ofTree(`unchanged sync down${stage.where}`);
  return { work, name: "tree", place: stage.local, stage, contenders, unchanged: true };
}

function syncUp(stage: Stage): Contest {
  const tree = join(stage.source, "tree");
  const contenders = [
    reprise(stage, (to) => ["sync", "--up", `${basename(to)}/tree`, tree]),
    ...rsync(stage, (module, to) => [`${tree}/`, `${module}/${basename(to)}/tree/`]),
  ];
  const work = ofTree(`unchanged sync up${stage.where}`);
  return { work, name: "tree", place: stage.served, stage, contenders, unchanged: true };
}

/** Put of one large file, next to its get: both between the same folders on tmpfs. */
function putLarge(stage: Stage): Contest {
  const work: Work = { name: `put of ${formatSize(SIZE)}`, amount: SIZE, unit: "bytes" };
  const contenders = [
    reprise(stage, (to) => ["put", join(stage.source, "big"), "-t", basename(to)]),
    reprise(stage, (to) => ["get", "big", "-d", to], "get by reprise"),
  ];
  return { work, name: "big", place: stage.served, stage, contenders };
}

const table = new Table();
let destinations = 0;

/** Runs every round of a contest and prints its rows. */
async function hold(contest: Contest): Promise<void> {
  const { contenders, place, stage } = contest;
  const filled = new Map<Contender, string>();
  for (const contender of contenders) {
    const destination = newDestination(place);
    filled.set(contender, destination);
    await attempt(contest, contender, () => rehearse(contest, contender, destination));
    if (!contest.unchanged) discard(destination, stage);
  }
  for (let round = 0; round < ROUNDS; round++) {
    for (const contender of contenders) {
      const destination = contest.unchanged ? filled.get(contender)! : newDestination(place);
      await attempt(contest, contender, () => play(contest, contender, destination));
      if (!contest.unchanged) discard(destination, stage);
    }
  }
  if (contest.unchanged) for (const destination of filled.values()) discard(destination, stage);
  table.print();
}

/** Does `action` unless the contender has failed before; when it fails now, that is its result. */
async function attempt({ work }: Contest, { name }: Contender, action: () => Promise<void>): Promise<void> {
  if (table.hasFailed(work, name)) return;
  await action().catch((error: Error) => table.fail(work, name, error.message));
}

/** A run that is not timed but verified. */
async function rehearse({ name, stage }: Contest, contender: Contender, destination: string): Promise<void> {
  await time(contender.command(destination));
  verify(join(destination, name), join(stage.source, name));
}

async function play({ work }: Contest, contender: Contender, destination: string): Promise<void> {
  const command = contender.command(destination);
  table.record(work, contender.name, await time(command));
}

function newDestination(place: string): string {
  const path = join(place, `destination-${++destinations}`);
  mkdirSync(path);
  return path;
}

function discard(destination: string, { keep }: Stage): void {
  // The next contender is to find an idle disk.
  if (keep) Bun.spawnSync(["sync", "-f", destination]);
  else rmSync(destination, { recursive: true, force: true });
  rmSync(listOf(destination), { force: true });
}

// ---------------------------------------------------------------------------------------------------- parts

/** A part of the bench, given the contenders' servers on tmpfs. */
type Part = (stage: Stage) => Promise<void>;

const PARTS: Record<string, Part> = {
  get: (stage) => hold(get(stage)),
  put: (stage) => hold(put(stage)),
  sync: holdSyncs,
  wire: overWire,
  disk: onDisk,
  large: (stage) => hold(putLarge(stage)),
  // After the rest of the table, for it prints sentences.
  memory: measureMemory,
};

async function holdSyncs(stage: Stage): Promise<void> {
  await hold(syncDown(stage));
  await hold(syncUp(stage));
}

async function overWire(stage: Stage): Promise<void> {
  const { nginx: _, rsync, ours, ...rest } = stage;
  await using toOurs = "port" in ours ? await startWire(ours.port, WIRE_MS) : undefined;
  await using toRsync = rsync ? await startWire(Number(new URL(rsync).port), WIRE_MS) : undefined;
  const far: Stage = { ...rest, where: ` at ${2 * WIRE_MS} ms`, ours: toOurs ? { port: toOurs.port } : ours };
  if (toRsync) far.rsync = moduleOf(toRsync);
  await hold(get(far));
  await hold(put(far));
  await holdSyncs(far);
}

async function onDisk(stage: Stage): Promise<void> {
  if (statfsSync(options.disk).type === TMPFS_MAGIC) return console.log(`\n${options.disk} is no disk: left out\n`);
  {
    using disk = temporaryFolder(options.disk);
    const { nginx: _, ...rest } = stage;
    const onto: Stage = { ...rest, where: " to disk", local: disk.path, served: disk.path, fsync: true, keep: true };
    await hold(get(onto));
    await using server = await startOurs(disk.path);
    using own = temporaryFolder(TMPFS);
    await using daemon = stage.rsync ? await startRsync(disk.path, own.path) : undefined;
    if (daemon) onto.rsync = moduleOf(daemon);
    await hold(put({ ...onto, ours: server.ours }));
  }
  // The removal above is not to disturb the next part.
  Bun.spawnSync(["sync", "-f", options.disk]);
}

async function measureMemory({ local }: Stage): Promise<void> {
  using source = temporaryFolder(TMPFS);
  using served = temporaryFolder(TMPFS);
  for (const { path } of [source, served]) writeTree(join(path, "tree"), MEMORY_FILES, MEMORY_FILE_BYTES);
  const into = newDestination(local);
  await printPeaks(served.path, ["get", "-r", "tree", "-d", into], source.path, into);
  rmSync(into, { recursive: true });
  const taken = newDestination(served.path);
  const tree = join(source.path, "tree");
  await printPeaks(served.path, ["put", "-r", tree, "-t", basename(taken)], source.path, taken);
}

/** Runs our client once, at a server that has done nothing before, and prints the most that each had in memory. */
async function printPeaks(root: string, args: string[], source: string, destination: string): Promise<void> {
  const what = `Memory for ${args[0]} of ${formatCount(MEMORY_FILES)} files of ${MEMORY_FILE_BYTES} bytes`;
  try {
    const peaks = await measurePeaks(root, args);
    verify(join(destination, "tree"), join(source, "tree"));
    console.log(`\n${what}: client ${formatSize(peaks.client)}, largest worker ${formatSize(peaks.worker)}`);
  } catch (error) {
    console.log(`\n${what}: failed, ${(error as Error).message}`);
  }
}

async function measurePeaks(root: string, args: string[]): Promise<{ client: number; worker: number }> {
  await using server = await startOurs(root);
  if ("failure" in server.ours) throw new Error(server.ours.failure);
  const workers = server.workers().map(peakResidentBytes);
  const child = start(client(...args, "-q", "--server", `127.0.0.1:${server.ours.port}`));
  const [peak] = await Promise.all([peakResidentBytes(child.pid), finish(child)]);
  // A worker's peak is known when it has gone.
  await server[Symbol.asyncDispose]();
  return { client: peak, worker: Math.max(...(await Promise.all(workers))) };
}

/**
 * Our server on `root`, or why it did not start. Its log goes to a file: read by the bench, line by line for each file,
 * it would take time from the client.
 */
async function startOurs(root: string): Promise<{ ours: Ours; workers(): number[] } & AsyncDisposable> {
  const own = temporaryFolder(TMPFS);
  const log = join(own.path, "log");
  const args = ["--port", "0", "--workers", "2", "--writable", "--log", "json"];
  const child = Bun.spawn([process.execPath, join(HOME, "server.ts"), root, ...args], {
    stdio: ["ignore", "pipe", Bun.file(log)],
  });
  const { value } = await child.stdout.getReader().read();
  const port = /:(\d+)\s*$/.exec(new TextDecoder().decode(value))?.[1];
  if (!port) await child.exited;
  return {
    ours: port ? { port: Number(port) } : { failure: `no server: ${firstLine(readFileSync(log, "utf8"))}` },
    workers: () => childrenOf(child.pid),
    async [Symbol.asyncDispose]() {
      child.kill("SIGINT");
      await child.exited;
      own[Symbol.dispose]();
    },
  };
}

const moduleOf = ({ port }: { port: number }) => `rsync://127.0.0.1:${port}/served`;

// ---------------------------------------------------------------------------------------------------- run

async function main(): Promise<void> {
  const parts = options.only ? [options.only] : Object.keys(PARTS);
  if (!parts.every((name) => name in PARTS)) throw new Error(`--only takes one of ${Object.keys(PARTS).join(", ")}`);
  const peers = findVersions("rsync", "curl", "nginx");
  printVersions(peers);
  const what = `${formatCount(FILES)} files of ${FILE_BYTES} bytes in ${FOLDERS} folders`;
  console.log(`${cpus().length} cores, ${cpus()[0]?.model}; ${what}, ${ROUNDS} rounds, medians\n`);

  using source = temporaryFolder(TMPFS);
  using served = temporaryFolder(TMPFS);
  using local = temporaryFolder(TMPFS);
  using own = temporaryFolder(TMPFS);
  writeLargeFile(join(source.path, "big"), SIZE);
  for (const { path } of [source, served]) writeTree(join(path, "tree"), FILES, FILE_BYTES);
  linkSync(join(source.path, "big"), join(served.path, "big"));

  await using nginx = peers.nginx && peers.curl ? await startNginx(served.path, own.path) : undefined;
  await using daemon = peers.rsync ? await startRsync(served.path, own.path) : undefined;
  await using server = await startOurs(served.path);
  const stage: Stage = {
    where: "",
    source: source.path,
    local: local.path,
    served: served.path,
    ours: server.ours,
    ...(nginx && { nginx: nginx.port }),
    ...(daemon && { rsync: moduleOf(daemon) }),
  };
  for (const name of parts) await PARTS[name]!(stage);
}

if (import.meta.main) await main();
