/**
 * How fast a file of a bucket comes through reprise, next to curl straight from the same gateway, in turn.
 *
 * ```sh
 * bun run bench:bucket                         # 1 GiB, 3 rounds, on a Ceph of its own
 * bun run bench:bucket --size 256M --rounds 5
 * ```
 *
 * A time is that of a whole client process. curl has a signed link and checks nothing; reprise reads by ranges under the
 * version that it has, and checks every chunk. Gateway, storage, server and client share one machine: where it has few
 * processors, what the server itself needs is taken from the gateway, too.
 */
import { readFileSync } from "node:fs";
import { cpus } from "node:os";
import { join } from "node:path";
import { formatSize } from "../../command.ts";
import { noCeph, startCeph } from "../engines.ts";
import { startServer, temporaryFolder, writeLargeFile } from "../fixtures.ts";
import {
  client,
  findVersions,
  median,
  parseCount,
  parseSize,
  printVersions,
  readOptions,
  Table,
  time,
} from "./bench.ts";

const options = readOptions({ size: "1G", rounds: "3" });
const SIZE = parseSize(options.size);
const ROUNDS = parseCount(options.rounds);
const BUCKET = "bench";
/** Of /proc/PID/stat: ticks of a hundredth of a second. */
const TICKS = 100;

if (noCeph) throw new Error(`There is nothing to compare with: ${noCeph}`);
const versions = findVersions("curl");
printVersions(versions);
console.log(`${cpus().length} cores, ${cpus()[0]?.model}; a file of ${formatSize(SIZE)}, ${ROUNDS} rounds, medians\n`);

await using ceph = await startCeph();
await ceph.createBucket(BUCKET);
await using server = await startServer(`s3://${BUCKET}`, { args: ["--writable"], env: ceph.env });
using folder = temporaryFolder();
const file = join(folder.path, "big");
writeLargeFile(file, SIZE);
const run = (...args: string[]) => time(client(...args, "-q"), { REPRISE_SERVER: server.address });
const link = new Bun.S3Client({ ...ceph.options, bucket: BUCKET }).file("big").presign({ expiresIn: 24 * 3600 });

const work = { name: "get to /dev/null", amount: SIZE, unit: "bytes" } as const;
const table = new Table();
const times: Record<"reprise" | "curl", number[]> = { reprise: [], curl: [] };
console.log(`put: ${formatSize(SIZE / (await run("put", file, "-t", "big", "-d", folder.path)))}/s`);
const before = secondsOf(server.workers());
for (let round = 0; round < ROUNDS; round++) {
  times.reprise.push(await run("get", "big", "-o", "/dev/null"));
  if (versions.curl) times.curl.push(await time(["curl", "-fsS", "-o", "/dev/null", link]));
}
const seconds = (secondsOf(server.workers()) - before) / ROUNDS;
for (const [name, all] of Object.entries(times)) for (const each of all) table.record(work, name, each);
table.print();
console.log(`\nThe server's workers need ${seconds.toFixed(2)} s of a processor for each of these gets`);
if (versions.curl)
  console.log(`ratio: ${(median(times.curl) / median(times.reprise)).toFixed(2)} x curl from the gateway`);

/** Of processor time that they had, all together. */
function secondsOf(pids: number[]): number {
  return pids.reduce((sum, pid) => {
    const fields = readFileSync(`/proc/${pid}/stat`, "utf8").split(") ").pop()!.split(" ");
    return sum + (Number(fields[11]) + Number(fields[12])) / TICKS;
  }, 0);
}
