/**
 * Shows what reprise is for: a download that is killed in the middle and goes on where it was.
 *
 * ```sh
 * bun run demo
 * bun run demo cluster                         # the same with several servers: see democluster.ts
 * ```
 *
 * Starts a server on a free port, fetches a generated file of 200 MB, kills the client with -9 half-way, fetches again,
 * and compares. Everything happens in a temporary folder, which is removed.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { formatSize } from "../command.ts";
import type { ResumeLog } from "../resume.ts";
import { sha256, spawnClient, startServer, temporaryFolder, waitFor, writeLargeFile } from "./fixtures.ts";

const SIZE = 200_000_000;

const say = (text: string) => process.stdout.write(`${text}\n`);

if (process.argv[2] === "cluster") await import("./democluster.ts");
else await demo();

async function demo(): Promise<void> {
  using folder = temporaryFolder();
  const root = join(folder.path, "server");
  const home = join(folder.path, "client");
  Bun.spawnSync(["mkdir", root, home]);
  say(`A file of ${formatSize(SIZE)} is made up.`);
  const digest = writeLargeFile(join(root, "film.mkv"), SIZE);

  // At a limited rate, so that there is a middle to be killed in.
  await using server = await startServer(root, { args: ["--limit-rate", "100M"] });
  say(`$ bun server.ts          listening on ${server.address}`);

  const args = ["get", "film.mkv", "-d", home];
  const log = () => JSON.parse(readFileSync(join(home, "film.mkv.resume.json"), "utf8")) as ResumeLog;
  const first = spawnClient(server.address, args);
  await waitFor(
    "half of it has come",
    () => Bun.file(join(home, "film.mkv.resume.json")).size && log().bytes > SIZE / 2,
  );
  first.kill("SIGKILL");
  await first.exited;
  const { bytes } = log();
  say(`$ bun client.ts get film.mkv     killed with -9; its log counts ${bytes} bytes`);

  const second = spawnClient(server.address, args);
  const status = await second.exited;
  const resumed = await waitFor("the server has logged it", () => server.log.find((line) => line.offset === bytes));
  say(
    `$ bun client.ts get film.mkv     goes on at byte ${resumed.offset}: ${resumed.bytes} bytes came, status ${status}`,
  );
  say(`Not sent twice: ${bytes} bytes.`);

  const same = (await sha256(join(home, "film.mkv"))) === digest;
  say(`sha256 ${digest.slice(0, 16)}…: ${same ? "equal" : "DIFFERENT"}`);
  if (!same || status !== 0) process.exitCode = 1;
}
