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
import { existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { connect } from "node:net";
import { cpus } from "node:os";
import { join } from "node:path";
import { formatSize } from "../../command.ts";
import { encodeHello, encodeRequest, TO_THE_END } from "../../protocol.ts";
import {
  HOME,
  peakResidentBytes,
  residentBytes,
  startServer,
  temporaryFolder,
  waitFor,
  writeLargeFile,
} from "../fixtures.ts";

const options = new Map(process.argv.slice(2).map((word, index, all) => [word, all[index + 1] ?? ""]));
const SIZE = parseSize(options.get("--size") ?? "2G");
const ROUNDS = Number(options.get("--rounds") ?? 5);
const SMALL_ROUNDS = ROUNDS * 10;
const SLOW_READERS = 1000;
const SLOW_RATE = 100_000;

function parseSize(text: string): number {
  const [, number, unit] = /^(\d+)([MG])$/.exec(text) ?? [];
  if (!number) throw new Error(`--size takes 512M or 2G, not ${text}`);
  return Number(number) * (unit === "G" ? 1 << 30 : 1 << 20);
}

interface Row {
  work: string;
  contender: string;
  /** Seconds, of each round. */
  times: number[];
  /** Bytes of each round. */
  bytes: number;
}

const median = (values: number[]) => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)]!;

/** Runs a process to its end and returns its seconds. */
async function time(cmd: string[], env: Record<string, string> = {}): Promise<number> {
  const startedAt = performance.now();
  const child = Bun.spawn(cmd, { env: { ...process.env, ...env }, stdio: ["ignore", "ignore", "pipe"] });
  const status = await child.exited;
  const seconds = (performance.now() - startedAt) / 1000;
  if (status !== 0)
    throw new Error(`${cmd.join(" ")} ended with ${status}: ${await new Response(child.stderr).text()}`);
  return seconds;
}

function versionOf(cmd: string[], pattern: RegExp): string | undefined {
  if (!Bun.which(cmd[0]!)) return undefined;
  const { stdout, stderr } = Bun.spawnSync(cmd);
  return pattern.exec(`${stdout}${stderr}`)?.[1];
}

/** nginx on a free port, with a configuration of its own. */
async function startNginx(root: string, folder: string): Promise<{ port: number } & AsyncDisposable> {
  const port = await freePort();
  writeFileSync(
    join(folder, "nginx.conf"),
    `worker_processes 2; daemon off; pid ${folder}/nginx.pid; error_log ${folder}/nginx.log;
     events { worker_connections 256; }
     http { sendfile on; tcp_nopush on; access_log off;
       client_body_temp_path ${folder}; proxy_temp_path ${folder}; fastcgi_temp_path ${folder};
       uwsgi_temp_path ${folder}; scgi_temp_path ${folder};
       server { listen 127.0.0.1:${port}; root ${root}; } }`,
  );
  // Its workers give up being root, and must still be able to read.
  Bun.spawnSync(["chmod", "-R", "a+rX", folder, root]);
  const child = Bun.spawn(["nginx", "-c", join(folder, "nginx.conf"), "-p", folder, "-e", join(folder, "nginx.log")], {
    stdio: ["ignore", "ignore", "ignore"],
  });
  await waitFor("nginx listens", () => canConnect(port));
  return {
    port,
    async [Symbol.asyncDispose]() {
      child.kill("SIGTERM");
      await child.exited;
    },
  };
}

async function freePort(): Promise<number> {
  const listener = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
  listener.stop(true);
  return listener.port;
}

function canConnect(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect({ host: "127.0.0.1", port });
    socket.once("connect", () => resolve(true)).once("error", () => resolve(false));
    socket.once("connect", () => socket.destroy());
  });
}

/** iperf3's one stream, as bytes a second. */
async function iperf(): Promise<number> {
  const port = await freePort();
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

const versions = {
  reprise: versionOf([process.execPath, join(HOME, "client.ts"), "--version"], /(\S+)/),
  Bun: Bun.version,
  nginx: versionOf(["nginx", "-v"], /nginx\/(\S+)/),
  curl: versionOf(["curl", "--version"], /curl (\S+)/),
  iperf3: versionOf(["iperf3", "--version"], /iperf (\S+)/),
};
console.log(
  Object.entries(versions)
    .map(([name, version]) => `${name} ${version ?? "not installed"}`)
    .join(", "),
);
console.log(`${cpus().length} cores, ${cpus()[0]?.model}; a file of ${formatSize(SIZE)}, ${ROUNDS} rounds, medians\n`);

await using server = await startServer(root);
await using single = await startServer(root, { args: ["--workers", "1"] });
const other = versions.nginx && versions.curl ? await startNginx(root, own.path) : undefined;
const reprise = (name: string, output: string) =>
  time([process.execPath, join(HOME, "client.ts"), "get", name, "-o", output, "-q"], {
    REPRISE_SERVER: server.address,
  });
const curl = (name: string, output: string) =>
  time(["curl", "-sS", "-o", output, `http://127.0.0.1:${other?.port}/${name}`]);

const rows: Row[] = [];
function record(work: string, contender: string, bytes: number, seconds: number): void {
  const known = rows.find((row) => row.work === work && row.contender === contender);
  if (known) known.times.push(seconds);
  else rows.push({ work, contender, times: [seconds], bytes });
}

const out = join(memory.path, "out");
for (let round = 0; round < ROUNDS; round++) {
  record("to /dev/null", "reprise", SIZE, await reprise("big", "/dev/null"));
  if (other) record("to /dev/null", "curl from nginx", SIZE, await curl("big", "/dev/null"));
  if (versions.iperf3) record("to /dev/null", "iperf3", SIZE, SIZE / (await iperf()));
}
for (let round = 0; round < ROUNDS; round++) {
  for (const [name, run] of [
    ["reprise", reprise],
    ["curl from nginx", curl],
  ] as const) {
    if (name !== "reprise" && !other) continue;
    record("to a file on tmpfs", name, SIZE, await run("big", out));
    rmSync(out);
  }
}
for (let round = 0; round < SMALL_ROUNDS; round++) {
  record("4 KiB, whole process", "reprise", 4096, await reprise("small", "/dev/null"));
  if (other) record("4 KiB, whole process", "curl from nginx", 4096, await curl("small", "/dev/null"));
}

console.log("| work | contender | median | rate | reprise is |\n|---|---|---|---|---|");
for (const { work, contender, times, bytes } of rows) {
  const ours = median(rows.find((row) => row.work === work && row.contender === "reprise")!.times);
  const seconds = median(times);
  const rate = bytes > 1e6 ? `${formatSize(bytes / seconds)}/s` : "";
  const ratio =
    contender === "reprise"
      ? ""
      : bytes > 1e6
        ? `${(seconds / ours).toFixed(2)} x its rate`
        : `${(ours / seconds).toFixed(2)} x its time`;
  console.log(`| ${work} | ${contender} | ${(seconds * 1000).toFixed(0)} ms | ${rate} | ${ratio} |`);
}

const peak = await peakMemory(["get", "big", "-o", out, "-q"]);
console.log(`\nClient memory for the whole file: ${formatSize(peak)} at most`);
const worker = await slowReaders(single.port, single.workers()[0]!);
console.log(
  `Worker memory with ${SLOW_READERS} readers at ${formatSize(SLOW_RATE)}/s of a 100 MB file: ${formatSize(worker)}`,
);
await other?.[Symbol.asyncDispose]();

async function peakMemory(args: string[]): Promise<number> {
  const child = Bun.spawn([process.execPath, join(HOME, "client.ts"), ...args], {
    env: { ...process.env, REPRISE_SERVER: server.address },
  });
  const peak = await peakResidentBytes(child.pid);
  await child.exited;
  return peak;
}
