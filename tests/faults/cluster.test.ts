/**
 * A cluster that is killed, stopped and filled up: see cluster.ts. For one that is cut apart see partition.test.ts.
 *
 * REPRISE_CLUSTER_SECONDS makes the first one shorter or longer, REPRISE_CLUSTER_SEED the first two others.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { mkdirSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { startCluster } from "../clusters.ts";
import { noEtcd } from "../engines.ts";
import { mountSmall, runClient, waitFor } from "../fixtures.ts";
import { type ChaosOptions, chaos } from "./cluster.ts";

const { REPRISE_CLUSTER_SECONDS, REPRISE_CLUSTER_SEED } = process.env;
const SECONDS = Number(REPRISE_CLUSTER_SECONDS ?? 120);
const EQUALS_SECONDS = 25;
const SEED = Number(REPRISE_CLUSTER_SEED ?? 1);
/** For the start, and until all have come to rest. */
const REST_MS = 300_000;

setDefaultTimeout(Math.max(SECONDS, EQUALS_SECONDS) * 1000 + REST_MS);
if (noEtcd) console.log(`skipped: the chaos of equals on etcd: ${noEtcd}`);

async function expectNoLoss(engine: ChaosOptions["engine"], seconds: number): Promise<void> {
  const report = await chaos({ engine, seed: SEED, seconds, pauseMs: [200, 2_500], say: () => {} });
  if (report.problems.length > 0) console.log(report.figures.map((figure) => figure.join(": ")).join("\n"));
  expect(report.problems).toEqual([]);
  expect(report.faults).toBeGreaterThan(seconds / 10);
}

test("four processes under kill -9, SIGSTOP, restart and a full disk: no acknowledged change is lost", () =>
  expectNoLoss("master", SECONDS));

test.skipIf(noEtcd !== undefined)("three equals and three members of etcd under the same: nor is any", () =>
  expectNoLoss("etcd", EQUALS_SECONDS),
);

test.skipIf(process.getuid?.() !== 0)("not a byte is left on one member: it says so, the others go on", async () => {
  using disk = mountSmall("64M");
  if (!disk) return;
  await using cluster = await startCluster({ replicas: 1, args: ["--writable", "--keep-free", "1M"] });
  const root = join(disk.path, "root");
  mkdirSync(root);
  symlinkSync(root, join(dirname(cluster.master.root), "C"));
  const full = await cluster.add();
  await cluster.live();
  const filler = join(disk.path, "filler");
  expect(() => writeFileSync(filler, new Uint8Array(64 * 2 ** 20))).toThrow("ENOSPC");
  const [other] = cluster.replicas;
  const put = (name: string) => runClient(other!.server.address, ["put", "-", "-t", name], { stdin: name });
  expect(await put("first")).toMatchObject({ status: 0, errors: "" });
  await waitFor("it says what is wrong", async () => (await full.status()).problem?.includes("no room"));
  expect(await put("second")).toMatchObject({ status: 0, errors: "" });
  rmSync(filler);
  await cluster.live();
  expect(await cluster.settled()).toHaveLength(2);
  for (const { server } of cluster.nodes) expect(server.stderr()).not.toContain('"event":"bug"');
});
