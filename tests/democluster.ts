/**
 * Shows a cluster: a master and three servers that have joined it, with nothing to set up but `--join`.
 *
 * ```sh
 * bun run demo cluster
 * ```
 *
 * A file is put through one and read from each; then the one that serves a download is killed with -9 in its middle, and
 * the download goes on from another. Everything happens in a temporary folder, which is removed.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { formatSize } from "../command.ts";
import type { ResumeLog } from "../resume.ts";
import { startCluster } from "./clusters.ts";
import { runClient, sha256, spawnClient, temporaryFolder, waitFor, writeLargeFile } from "./fixtures.ts";

const SIZE = 100_000_000;

const say = (text: string) => process.stdout.write(`${text}\n`);
let isWrong = false;
const check = (what: string, isRight: boolean) => {
  say(`${what}: ${isRight ? "equal" : "DIFFERENT"}`);
  isWrong ||= !isRight;
};

using folder = temporaryFolder();
const file = join(folder.path, "film.mkv");
const digest = writeLargeFile(file, SIZE);

// At a limited rate, so that there is a middle in which one can be killed.
await using cluster = await startCluster({ replicas: 3, args: ["--writable", "--limit-rate", "60M"] });
const [master, ...replicas] = cluster.nodes;
say(`$ bun server.ts A                     listening on ${master!.server.address}`);
for (const { name, server } of replicas)
  say(`$ bun server.ts ${name} --join ${cluster.address}     listening on ${server.address}`);

const put = await runClient(cluster.address, ["put", file, "-q", "-d", folder.path]);
say(`$ bun client.ts put film.mkv          ${formatSize(SIZE)}, through one of the three: status ${put.status}`);
isWrong ||= put.status !== 0;
await cluster.settled();
for (const { name, root } of cluster.nodes)
  check(`  sha256 of the copy at ${name}`, (await sha256(join(root, "film.mkv"))) === digest);

const got = join(folder.path, "got.mkv");
const client = spawnClient(cluster.address, ["get", "film.mkv", "-o", got]);
const log = () => JSON.parse(readFileSync(`${got}.resume.json`, "utf8")) as ResumeLog;
await waitFor("half of it has come", () => Bun.file(`${got}.resume.json`).size && log().bytes > SIZE / 2);
const sent = master!.server.log.findLast(({ event }) => event === "redirect")!.to!;
const victim = replicas.find(({ server }) => server.address === sent)!;
await victim.kill();
say(`$ bun client.ts get film.mkv          in the middle ${victim.name}, which serves it, is killed with -9`);
const said = await new Response(client.stderr).text();
const status = await client.exited;
for (const line of said.trim().split("\n")) say(`  ${line}`);
const rest = await waitFor("the server has logged the rest", () =>
  replicas.flatMap(({ server }) => server.log).find(({ event, offset = 0 }) => event === "get" && offset > 0),
);
say(`  it goes on at byte ${rest.offset} with another: status ${status}`);
check("  sha256 of what has come", status === 0 && (await sha256(got)) === digest);
say("$ bun client.ts status");
say((await runClient(cluster.address, ["status"])).output.trimEnd());
if (isWrong) process.exitCode = 1;
