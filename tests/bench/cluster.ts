/**
 * How fast a cluster of a master and three replicas on one machine carries changes, and what it costs.
 *
 * ```sh
 * bun run bench:cluster                                      # every part
 * bun run bench:cluster --only latency,files                 # some
 * bun run bench:cluster --only latency,files --engine etcd   # of three equals, whose ledger three members of etcd keep
 * ```
 *
 * Parts: `latency` of a put of 1 KiB and of a change by another program, until it is in all four trees; `files`: 10,000
 * files of 4 KiB put through one, until all have them, next to one rsync of the same from its daemon, in turn; `large`:
 * memory with 100,000 files and the time that a look at all of them takes; `redirect`: a small get with and without being
 * sent on; `throughput` of several clients on one, two and three nodes. Roots are on tmpfs where there is one.
 */
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { cpus } from "node:os";
import { join } from "node:path";
import { formatSize } from "../../command.ts";
import { Remote } from "../../remote.ts";
import { FileSource } from "../../source.ts";
import { type Cluster, type Node, startCluster } from "../clusters.ts";
import { startEtcd } from "../engines.ts";
import { childrenOf, makeRoot, randomBytes, temporaryFolder, waitFor } from "../fixtures.ts";
import { client, findVersions, median, parseCount, printVersions, readOptions, startRsync, time } from "./bench.ts";

const options = readOptions({ only: "", engine: "master", rounds: "3", files: "10000", many: "100000", clients: "6" });
const ROUNDS = parseCount(options.rounds);
const FILES = parseCount(options.files);
const MANY = parseCount(options.many);
const CLIENTS = parseCount(options.clients);
const PUTS = 100;
const FOLDERS = 100;
const LARGE_BYTES = 256 * 1024 * 1024;

const say = (text: string) => console.log(text);
const ms = (value: number) => `${value.toFixed(0)} ms`;

const etcd = options.engine === "etcd" ? await startEtcd({ members: 3 }) : undefined;

const PARTS = { latency, files, large, redirect, throughput };

printVersions(findVersions("rsync"));
console.log(`${cpus().length} cores, ${cpus()[0]?.model}`);
const wanted = options.only === "" ? Object.keys(PARTS) : options.only.split(",");
for (const name of wanted) {
  const part = PARTS[name as keyof typeof PARTS];
  if (!part) throw new Error(`There is no part ${name}; there are ${Object.keys(PARTS).join(", ")}`);
  await part();
}
await etcd?.[Symbol.asyncDispose]();

// ---------------------------------------------------------------------------------------------------- parts

async function latency(): Promise<void> {
  await using cluster = await startAll();
  const remote = new Remote({ servers: [addressOf(cluster.master)] });
  const put: number[] = [];
  const acknowledged: number[] = [];
  for (let round = 0; round < PUTS; round++) {
    const [folder, name] = [makeRoot({ f: randomBytes(1024, round + 1) }), `put-${round}`];
    using _ = folder;
    const source = new FileSource(join(folder.path, "f"));
    const startedAt = performance.now();
    const done = remote.upload({ path: name, id: "", noClobber: false, etag: "", parents: false }, source);
    const everywhere = untilIn(cluster, name).then(() => put.push(performance.now() - startedAt));
    await done.then(() => acknowledged.push(performance.now() - startedAt));
    await everywhere;
    source.close();
  }
  await remote.quit();
  say(`put of 1 KiB, ${PUTS} times: acknowledged after ${ms(median(acknowledged))}, in all trees after ${spread(put)}`);
  const outside: number[] = [];
  for (let round = 0; round < PUTS / 4; round++) {
    const node = cluster.nodes[round % cluster.nodes.length]!;
    const startedAt = performance.now();
    writeFileSync(join(node.root, `outside-${round}`), "x");
    await untilIn(cluster, `outside-${round}`);
    outside.push(performance.now() - startedAt);
  }
  say(`a file written by another program, ${outside.length} times: in all trees after ${spread(outside)}`);
}

async function files(): Promise<void> {
  using source = temporaryFolder(tmpfs());
  const tree = join(source.path, "tree");
  writeFiles(tree, FILES, 4096);
  await using rsync = await startRsync(source.path, source.path);
  const times = { rsync: [] as number[], put: [] as number[], all: [] as number[] };
  for (let round = 0; round < ROUNDS; round++) {
    using there = temporaryFolder(tmpfs());
    const cmd = ["rsync", "-a", `rsync://127.0.0.1:${rsync.port}/served/tree`, there.path];
    times.rsync.push((await time(cmd)) * 1000);
    await using cluster = await startAll(tmpfs());
    const startedAt = performance.now();
    await time(client("put", "-r", tree, "-t", "tree", "-q", "-d", source.path, "--server", cluster.address));
    times.put.push(performance.now() - startedAt);
    await untilAllHave(cluster, FILES + FOLDERS + 1);
    times.all.push(performance.now() - startedAt);
  }
  const [one, put, all] = [times.rsync, times.put, times.all].map(median) as [number, number, number];
  say(`${FILES} files of 4 KiB: rsync ${ms(one)}; put acknowledged ${ms(put)}, on all ${ms(all)}`);
  say(`  which is ${(all / one).toFixed(2)} x the time of one rsync`);
}

async function large(): Promise<void> {
  await using cluster = await startCluster({ replicas: 1, parent: tmpfs() });
  const [master, replica] = cluster.nodes as [Node, Node];
  const startedAt = performance.now();
  writeFiles(join(master.root, "tree"), MANY, 100);
  await untilAllHave(cluster, MANY + FOLDERS + 1);
  say(`${MANY} files of 100 B written by another program: on the replica after ${ms(performance.now() - startedAt)}`);
  for (const [name, node] of [
    ["master", master],
    ["replica", replica],
  ] as const)
    say(`  ${name}: ${memoryOf(node)}`);
  await replica.kill();
  const killedAt = performance.now();
  await replica.start();
  const listened = performance.now();
  await waitFor("it has joined", () =>
    replica.server.log.some(({ event, status }) => event === "join" && status === "ok"),
  );
  const joined = performance.now();
  say(
    `  started again: listens after ${ms(listened - killedAt)}, has looked at all and joined after ${ms(joined - listened)} more`,
  );
  for (const [name, node] of [
    ["master", master],
    ["replica", replica],
  ] as const)
    say(`  ${name}: ${memoryOf(node)}`);
}

async function redirect(): Promise<void> {
  await using cluster = await startCluster({ replicas: 2, files: { small: randomBytes(4096) } });
  await cluster.settled();
  const times = { direct: [] as number[], sent: [] as number[] };
  for (let round = 0; round < 30; round++) {
    const get = (server: string) => time([...client("get", "small", "-o", "/dev/null", "--server", server)]);
    times.direct.push((await get(cluster.replicas[0]!.server.address)) * 1000);
    times.sent.push((await get(cluster.address)) * 1000);
  }
  const lines = cluster.nodes.flatMap(({ server }) => server.log);
  const redirects = lines.filter(({ event }) => event === "redirect").length;
  say(
    `a get of 4 KiB, whole process: ${ms(median(times.direct))} at a replica, ${ms(median(times.sent))} sent on by the master`,
  );
  say(`  ${redirects} redirects for ${times.sent.length} gets: one more connection each`);
}

async function throughput(): Promise<void> {
  for (const nodes of [1, 2, 3]) {
    await using cluster = await startCluster({
      replicas: nodes - 1,
      parent: tmpfs(),
      files: { film: randomBytes(LARGE_BYTES) },
    });
    await cluster.settled();
    const gets = Array.from({ length: CLIENTS }, () =>
      time(client("get", "film", "-o", "/dev/null", "--server", cluster.address)),
    );
    const startedAt = performance.now();
    await Promise.all(gets);
    const rate = (CLIENTS * LARGE_BYTES) / ((performance.now() - startedAt) / 1000);
    say(`${CLIENTS} clients, ${nodes} node${nodes > 1 ? "s" : ""}: ${formatSize(rate)}/s in all`);
  }
}

// ---------------------------------------------------------------------------------------------------- tools

/** Of etcd each time another ledger. */
function startAll(parent?: string): Promise<Cluster> {
  return startCluster({ replicas: etcd ? 2 : 3, parent, ledger: etcd?.url(`bench-${crypto.randomUUID()}`) });
}

async function untilIn(cluster: Cluster, name: string): Promise<void> {
  while (!cluster.nodes.every(({ root }) => existsSync(join(root, name)))) await Bun.sleep(1);
}

/** By the master's status, so that nobody is kept from work by being looked at. Among equals revisions have gaps. */
async function untilAllHave(cluster: Cluster, records: number): Promise<void> {
  for (;;) {
    const { revision, replicas } = await cluster.master.status();
    if ((etcd || revision >= records) && replicas.every(({ lag }) => lag === 0)) break;
    await Bun.sleep(20);
  }
  for (const { root } of cluster.nodes) {
    const count = readdirSync(join(root, "tree"), { recursive: true }).length;
    if (count !== records - 1) throw new Error(`${root} has ${count} of ${records - 1}`);
  }
}

function writeFiles(folder: string, count: number, length: number): void {
  for (let index = 0; index < FOLDERS; index++) mkdirSync(join(folder, String(index)), { recursive: true });
  for (let index = 0; index < count; index++)
    writeFileSync(join(folder, String(index % FOLDERS), `file-${index}`), randomBytes(length, index + 1));
}

/** Each process's own share, and what they have together; shared pages count in parts. */
function memoryOf({ server }: Node): string {
  const pids = [server.process.pid, ...childrenOf(server.process.pid)];
  const shares = pids.map((pid) => ({ name: nameOf(pid), bytes: shareOf(pid) }));
  const all = shares.reduce((sum, { bytes }) => sum + bytes, 0);
  return `${formatSize(all)} in all (${shares.map(({ name, bytes }) => `${name} ${formatSize(bytes)}`).join(", ")})`;
}

function shareOf(pid: number): number {
  const text = readFileSync(`/proc/${pid}/smaps_rollup`, "utf8");
  return Number(/^Pss:\s+(\d+) kB/m.exec(text)?.[1]) * 1024;
}

function nameOf(pid: number): string {
  const environment = readFileSync(`/proc/${pid}/environ`, "utf8");
  if (environment.includes("REPRISE_KEEPER=")) return "keeper";
  return environment.includes("REPRISE_WORKER=") ? "worker" : "supervisor";
}

function addressOf({ server }: Node): { host: string; port: number } {
  return { host: "127.0.0.1", port: server.port };
}

function tmpfs(): string | undefined {
  return existsSync("/dev/shm") ? "/dev/shm" : undefined;
}

function spread(values: number[]): string {
  const sorted = values.toSorted((a, b) => a - b);
  return `${ms(median(values))} (median; ${ms(sorted[0]!)} to ${ms(sorted.at(-1)!)})`;
}
