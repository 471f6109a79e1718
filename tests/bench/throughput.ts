/**
 * How fast reprise is next to what a user would take instead, in one run on one machine.
 *
 * ```sh
 * bun run bench                    # 2 GiB, 5 rounds
 * bun run bench --size 512M --rounds 3
 * ```
 *
 * Each round runs every contender once, in turn, so that a noisy machine is noisy for all; the medians are compared.
 * A time is that of a whole client process. The files are read once before, so that they come from the page cache, and
 * content is checked by reprise as always. nginx serves with sendfile and 2 workers, reprise with 2 workers.
 */
import { existsSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { connect } from "node:net";
import { cpus } from "node:os";
import { join } from "node:path";
import { formatSize } from "../../command.ts";
import { encodeHello, encodeRequest, TO_THE_END } from "../../protocol.ts";
import { authority, hasOpenssl, pair } from "../certificates.ts";
import {
  peakResidentBytes,
  residentBytes,
  startServer,
  temporaryFolder,
  waitFor,
  writeLargeFile,
} from "../fixtures.ts";
import {
  client,
  findVersions,
  freePort,
  parseCount,
  parseSize,
  printVersions,
  readOptions,
  startNginx,
  Table,
  time,
  type Work,
} from "./bench.ts";

const options = readOptions({ size: "2G", rounds: "5" });
const SIZE = parseSize(options.size);
const ROUNDS = parseCount(options.rounds);
const SMALL_ROUNDS = ROUNDS * 10;
const SLOW_READERS = 1000;
const SLOW_RATE = 100_000;

/** iperf3's one stream, as bytes a second. */
async function iperf(): Promise<number> {
  const port = freePort();
  const server = Bun.spawn(["iperf3", "-s", "-1", "-B", "127.0.0.1", "-p", String(port)], {
    stdio: ["ignore", "ignore", "ignore"],
  });
  await waitFor("iperf3 listens", () => isListening(port));
  const client = Bun.spawn(["iperf3", "-c", "127.0.0.1", "-p", String(port), "-n", String(SIZE), "-J"], {
    stdio: ["ignore", "pipe", "ignore"],
  });
  const report = (await new Response(client.stdout).json()) as { end: { sum_received: { bits_per_second: number } } };
  await server.exited;
  return report.end.sum_received.bits_per_second / 8;
}

/** Without connecting: iperf3 -1 would take that for its one client. */
function isListening(port: number): boolean {
  return readFileSync("/proc/net/tcp", "utf8").includes(
    `:${port.toString(16).toUpperCase().padStart(4, "0")} 00000000:0000 0A`,
  );
}

/** A thousand readers at 100 KB/s each, for a while; returns the largest resident memory of a worker meanwhile. */
async function slowReaders(port: number, worker: number): Promise<number> {
  const hello = Buffer.concat([
    encodeHello(),
    encodeRequest({ action: "get", path: "slow", offset: 0, length: TO_THE_END, etag: "" }),
  ]);
  const sockets = Array.from({ length: SLOW_READERS }, () => connect({ host: "127.0.0.1", port }));
  let received = 0;
  for (const socket of sockets) {
    socket.once("connect", () => socket.write(hello));
    socket.on("data", (bytes) => {
      received += bytes.length;
      socket.pause();
      setTimeout(() => socket.resume(), (bytes.length / SLOW_RATE) * 1000);
    });
  }
  let most = 0;
  while (received < SLOW_READERS * SLOW_RATE * 5) {
    most = Math.max(most, await residentBytes(worker));
    await Bun.sleep(100);
  }
  for (const socket of sockets) socket.destroy();
  return most;
}

// ---------------------------------------------------------------------------------------------------- run

using folder = temporaryFolder();
using own = temporaryFolder();
using memory = temporaryFolder(existsSync("/dev/shm") ? "/dev/shm" : undefined);
const root = folder.path;
for (const [name, size] of [
  ["big", SIZE],
  ["small", 4096],
  ["slow", 100_000_000],
] as const)
  writeLargeFile(join(root, name), size);
for (const name of readdirSync(root)) await time(["cat", join(root, name)]);

const versions = findVersions("nginx", "curl", "iperf3");
printVersions(versions);
console.log(`${cpus().length} cores, ${cpus()[0]?.model}; a file of ${formatSize(SIZE)}, ${ROUNDS} rounds, medians\n`);

await using server = await startServer(root);
await using single = await startServer(root, { args: ["--workers", "1"] });
const other = versions.nginx && versions.curl ? await startNginx(root, own.path) : undefined;
const reprise = (name: string, output: string) =>
  time(client("get", name, "-o", output, "-q"), { REPRISE_SERVER: server.address });
const curl = (name: string, output: string) =>
  time(["curl", "-sS", "-o", output, `http://127.0.0.1:${other?.port}/${name}`]);

const table = new Table();
const toNull: Work = { name: "to /dev/null", amount: SIZE, unit: "bytes" };
const overTls: Work = { name: "to /dev/null over TLS", amount: SIZE, unit: "bytes" };
const toFile: Work = { name: "to a file on tmpfs", amount: SIZE, unit: "bytes" };
const small: Work = { name: "4 KiB, whole process" };

const out = join(memory.path, "out");
for (let round = 0; round < ROUNDS; round++) {
  table.record(toNull, "reprise", await reprise("big", "/dev/null"));
  if (other) table.record(toNull, "curl from nginx", await curl("big", "/dev/null"));
  if (versions.iperf3) table.record(toNull, "iperf3", SIZE / (await iperf()));
}
if (hasOpenssl) await compareTls();
for (let round = 0; round < ROUNDS; round++) {
  for (const [name, run] of [
    ["reprise", reprise],
    ["curl from nginx", curl],
  ] as const) {
    if (name !== "reprise" && !other) continue;
    table.record(toFile, name, await run("big", out));
    rmSync(out);
  }
}
for (let round = 0; round < SMALL_ROUNDS; round++) {
  table.record(small, "reprise", await reprise("small", "/dev/null"));
  if (other) table.record(small, "curl from nginx", await curl("small", "/dev/null"));
}
table.print();

const peak = await peakMemory(["get", "big", "-o", out, "-q"]);
console.log(`\nClient memory for the whole file: ${formatSize(peak)} at most`);
const worker = await slowReaders(single.port, single.workers()[0]!);
console.log(
  `Worker memory with ${SLOW_READERS} readers at ${formatSize(SLOW_RATE)}/s of a 100 MB file: ${formatSize(worker)}`,
);
await other?.[Symbol.asyncDispose]();

async function compareTls(): Promise<void> {
  const certificate = pair("good");
  await using server = await startServer(root, { args: certificate.args });
  using folder = temporaryFolder();
  await using nginx = other && (await startNginx(root, folder.path, certificate));
  const ca = authority();
  for (let round = 0; round < ROUNDS; round++) {
    const ours = client("get", "big", "-o", "/dev/null", "-q", "--ca", ca);
    table.record(overTls, "reprise", await time(ours, { REPRISE_SERVER: server.address }));
    const url = `https://127.0.0.1:${nginx?.port}/big`;
    if (nginx)
      table.record(overTls, "curl from nginx", await time(["curl", "-sS", "--cacert", ca, "-o", "/dev/null", url]));
  }
}

async function peakMemory(args: string[]): Promise<number> {
  const child = Bun.spawn(client(...args), { env: { ...process.env, REPRISE_SERVER: server.address } });
  const peak = await peakResidentBytes(child.pid);
  await child.exited;
  return peak;
}
