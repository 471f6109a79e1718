/**
 * What the benches share: options, processes timed to their end, the peers they are compared with, and the table.
 */
import { writeFileSync } from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { formatSize } from "../../command.ts";
import { HOME, waitFor } from "../fixtures.ts";

/** Longer than any contender takes: one that hangs is ended and counts as failed. */
const CONTENDER_MS = 15 * 60_000;

// ---------------------------------------------------------------------------------------------------- options

/** The options of the command line, each with a value, over their defaults. An unknown one is an error. */
export function readOptions<Name extends string>(defaults: Record<Name, string>): Record<Name, string> {
  const names = Object.keys(defaults) as Name[];
  const options = Object.fromEntries(names.map((name) => [name, { type: "string" as const }]));
  const { values } = parseArgs({ args: process.argv.slice(2), options });
  return { ...defaults, ...(values as Partial<Record<Name, string>>) };
}

export function parseSize(text: string): number {
  const [, number, unit] = /^(\d+)([MG])$/.exec(text) ?? [];
  if (!number) throw new Error(`--size takes 512M or 2G, not ${text}`);
  return Number(number) * (unit === "G" ? 2 ** 30 : 2 ** 20);
}

export function parseCount(text: string): number {
  if (!/^[1-9]\d*$/.test(text)) throw new Error(`A count is 1 or more, not ${text}`);
  return Number(text);
}

// ---------------------------------------------------------------------------------------------------- processes

/** Starts a contender; only its stderr is kept. */
export function start(cmd: string[], env: Record<string, string> = {}) {
  return Bun.spawn(cmd, {
    env: { ...process.env, ...env },
    stdio: ["ignore", "ignore", "pipe"],
    timeout: CONTENDER_MS,
  });
}

/** Waits for its end; throws with the first line that it said when it did not go well. */
export async function finish(child: ReturnType<typeof start>): Promise<void> {
  // Read while it runs: ten thousand complaints would fill the pipe and stop it.
  const [status, said] = await Promise.all([child.exited, new Response(child.stderr).text()]);
  if (status === 0) return;
  throw new Error(`${child.signalCode ?? `status ${status}`}: ${firstLine(said)}`);
}

/** Runs a process to its end and returns its seconds. */
export async function time(cmd: string[], env: Record<string, string> = {}): Promise<number> {
  const startedAt = performance.now();
  const child = start(cmd, env);
  await finish(child).catch((error: Error) => {
    throw new Error(error.message, { cause: cmd.join(" ") });
  });
  return (performance.now() - startedAt) / 1000;
}

export const firstLine = (text: string) => text.trim().split("\n", 1)[0]!;

/** The command line of our own client. */
export const client = (...args: string[]) => [process.execPath, join(HOME, "client.ts"), ...args];

// ---------------------------------------------------------------------------------------------------- peers

export function versionOf(cmd: string[], pattern: RegExp): string | undefined {
  if (!Bun.which(cmd[0]!)) return undefined;
  const { stdout, stderr } = Bun.spawnSync(cmd);
  return pattern.exec(`${stdout}${stderr}`)?.[1];
}

/** The versions of ours and of those peers that are installed. */
export function findVersions<Name extends PeerName>(...peers: Name[]): Record<Name, string | undefined> {
  const found = peers.map((peer: PeerName) => [peer, versionOf(...PEERS[peer])]);
  return Object.fromEntries(found) as Record<Name, string | undefined>;
}

type PeerName = "nginx" | "curl" | "iperf3" | "rsync";

const PEERS: Record<PeerName, [string[], RegExp]> = {
  nginx: [["nginx", "-v"], /nginx\/(\S+)/],
  curl: [["curl", "--version"], /curl (\S+)/],
  iperf3: [["iperf3", "--version"], /iperf (\S+)/],
  rsync: [["rsync", "--version"], /version (\S+)/],
};

export function printVersions(peers: Record<string, string | undefined>): void {
  const versions = { reprise: versionOf(client("--version"), /(\S+)/), Bun: Bun.version, ...peers };
  const words = Object.entries(versions).map(([name, version]) => `${name} ${version ?? "not installed"}`);
  console.log(words.join(", "));
}

/** A server for the contest, on a port of its own. */
export interface Peer extends AsyncDisposable {
  port: number;
}

/** nginx on a free port, with a configuration of its own in `folder`, and over TLS with a certificate. */
export async function startNginx(root: string, folder: string, tls?: { cert: string; key: string }): Promise<Peer> {
  const port = freePort();
  writeFileSync(
    join(folder, "nginx.conf"),
    `worker_processes 2; daemon off; pid ${folder}/nginx.pid; error_log ${folder}/nginx.log;
     events { worker_connections 256; }
     http { sendfile on; tcp_nopush on; access_log off;
       client_body_temp_path ${folder}; proxy_temp_path ${folder}; fastcgi_temp_path ${folder};
       uwsgi_temp_path ${folder}; scgi_temp_path ${folder};
       server { listen 127.0.0.1:${port}${tls ? " ssl" : ""}; root ${root}; ${certificateFor(tls)} } }`,
  );
  // Its workers give up being root, and must still be able to read.
  Bun.spawnSync(["chmod", "-R", "a+rX", folder, root]);
  const log = join(folder, "nginx.log");
  return startPeer(["nginx", "-c", join(folder, "nginx.conf"), "-p", folder, "-e", log], port);
}

function certificateFor(tls: { cert: string; key: string } | undefined): string {
  return tls ? `ssl_certificate ${tls.cert}; ssl_certificate_key ${tls.key}; ssl_protocols TLSv1.3;` : "";
}

/** rsync's daemon on a free port, with `root` as its module `served`, to read and to write. */
export async function startRsync(root: string, folder: string): Promise<Peer> {
  const port = freePort();
  // Started by root it would become nobody, who can write nothing here.
  const owner = process.getuid?.() === 0 ? "uid = 0\ngid = 0\n" : "";
  const config = join(folder, "rsyncd.conf");
  const log = join(folder, "rsyncd.log");
  const module = `[served]\npath = ${root}\nread only = no\n`;
  writeFileSync(config, `use chroot = no\nreverse lookup = no\nlog file = ${log}\n${owner}${module}`);
  const address = ["--address=127.0.0.1", `--port=${port}`];
  return startPeer(["rsync", "--daemon", "--no-detach", `--config=${config}`, ...address], port);
}

async function startPeer(cmd: string[], port: number): Promise<Peer> {
  const child = Bun.spawn(cmd, { stdio: ["ignore", "ignore", "ignore"] });
  await waitFor(`${cmd[0]} listens`, () => canConnect(port));
  return {
    port,
    async [Symbol.asyncDispose]() {
      child.kill("SIGTERM");
      await child.exited;
    },
  };
}

export function freePort(): number {
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

// ---------------------------------------------------------------------------------------------------- table

/** What is done once in a round. Without a unit the times are compared, else the rates. */
export interface Work {
  name: string;
  amount?: number;
  unit?: "bytes" | "files";
}

interface Row {
  work: Work;
  contender: string;
  /** Seconds of each round. */
  times: number[];
  failure?: string;
}

/** The results: a row for each work and contender. */
export class Table {
  #rows: Row[] = [];
  #headed = false;

  record(work: Work, contender: string, seconds: number): void {
    this.#row(work, contender).times.push(seconds);
  }

  fail(work: Work, contender: string, failure: string): void {
    this.#row(work, contender).failure = failure;
  }

  hasFailed(work: Work, contender: string): boolean {
    return this.#find(work, contender)?.failure !== undefined;
  }

  /** Prints what was not yet printed, after a head the first time. */
  print(): void {
    if (!this.#headed) console.log("| work | contender | median | rate | reprise is |\n|---|---|---|---|---|");
    this.#headed = true;
    for (const row of this.#rows) console.log(formatRow(row, this.#find(row.work, "reprise")));
    this.#rows = [];
  }

  #find(work: Work, contender: string): Row | undefined {
    return this.#rows.find((row) => row.work === work && row.contender === contender);
  }

  #row(work: Work, contender: string): Row {
    const known = this.#find(work, contender);
    if (known) return known;
    const row = { work, contender, times: [] };
    this.#rows.push(row);
    return row;
  }
}

export const median = (values: number[]) => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)]!;

function formatRow(row: Row, ours: Row | undefined): string {
  const { work, contender, times, failure } = row;
  if (failure !== undefined) return `| ${work.name} | ${contender} | failed | | ${failure} |`;
  const seconds = median(times);
  const compared = ours && row !== ours && ours.failure === undefined;
  const ratio = compared ? formatRatio(work, seconds, median(ours.times)) : "";
  return `| ${work.name} | ${contender} | ${(seconds * 1000).toFixed(0)} ms | ${formatRate(work, seconds)} | ${ratio} |`;
}

function formatRatio({ unit }: Work, seconds: number, ours: number): string {
  return unit ? `${(seconds / ours).toFixed(2)} x its rate` : `${(ours / seconds).toFixed(2)} x its time`;
}

function formatRate({ amount = 0, unit }: Work, seconds: number): string {
  if (unit === "bytes") return `${formatSize(amount / seconds)}/s`;
  return unit === "files" ? `${formatCount(amount / seconds)} files/s` : "";
}

export const formatCount = (count: number) => Math.round(count).toLocaleString("en");
