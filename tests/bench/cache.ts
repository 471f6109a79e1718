/**
 * A large file of a bucket from the read cache, next to the same file of a folder and to one read from the gateway, in
 * one run on one machine. The gateway is Ceph's, on this machine too.
 *
 * ```sh
 * bun run bench:cache                    # 1 GiB, 7 rounds
 * bun run bench:cache --size 256M
 * ```
 *
 * Each round runs every contender once, in turn; the medians are compared. A time is that of a whole client process.
 */
import { cpus } from "node:os";
import { join } from "node:path";
import { formatSize } from "../../command.ts";
import { noCeph, startCeph } from "../engines.ts";
import { residentBytes, startServer, temporaryFolder, writeLargeFile } from "../fixtures.ts";
import {
  client,
  findVersions,
  parseCount,
  parseSize,
  printVersions,
  readOptions,
  Table,
  time,
  type Work,
} from "./bench.ts";

const options = readOptions({ size: "1G", rounds: "7" });
const SIZE = parseSize(options.size);
const ROUNDS = parseCount(options.rounds);
if (noCeph) throw new Error(`No gateway: ${noCeph}`);

using folder = temporaryFolder();
using cache = temporaryFolder();
writeLargeFile(join(folder.path, "big"), SIZE);
await using ceph = await startCeph();
await ceph.createBucket("bench");
const put = await Bun.spawn(
  [
    process.execPath,
    "-e",
    'await new Bun.S3Client({ bucket: "bench" }).write("big", Bun.file(process.argv[1]))',
    join(folder.path, "big"),
  ],
  { env: { ...process.env, ...ceph.env, AWS_ENDPOINT: ceph.endpoint }, stdio: ["ignore", "inherit", "inherit"] },
).exited;
if (put !== 0) throw new Error("The file could not be put into the bucket");

printVersions(findVersions("curl"));
console.log(`${cpus().length} cores, ${cpus()[0]?.model}; a file of ${formatSize(SIZE)}, ${ROUNDS} rounds, medians\n`);

await using plain = await startServer(folder.path);
await using cached = await startServer("s3://bench", { args: ["--cache", cache.path], env: ceph.env });
await using straight = await startServer("s3://bench", { env: ceph.env });
const get = (address: string) => time(client("get", "big", "-o", "/dev/null", "-q"), { REPRISE_SERVER: address });

const table = new Table();
const work: Work = { name: "to /dev/null", amount: SIZE, unit: "bytes" };
console.log(`the first get, which fills the cache: ${formatSize(SIZE / (await get(cached.address)))}/s`);
await get(plain.address);
for (let round = 0; round < ROUNDS; round++) {
  table.record(work, "from the cache", await get(cached.address));
  table.record(work, "from a folder", await get(plain.address));
  if (round < 3) table.record(work, "from the gateway", await get(straight.address));
}
table.print();
const memory = await Promise.all(cached.workers().map(residentBytes));
console.log(`\nWorker memory: ${memory.map(formatSize).join(", ")}`);
