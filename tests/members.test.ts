/** Servers of one bucket: each serves all of it, and they share nothing but who the members are. */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { readdirSync } from "node:fs";
import type { MemberStatus } from "../hub.ts";
import { statusOf } from "./clusters.ts";
import { type Ceph, noCeph, noEtcd, startCeph, startEtcd } from "./engines.ts";
import { makeRoot, runClient, type Server, startServer, TEST_MS, temporaryFolder, waitFor } from "./fixtures.ts";

setDefaultTimeout(TEST_MS);
if (noCeph !== undefined) console.log(`skipped: servers of one bucket (${noCeph})`);
const noEngine = noCeph ?? noEtcd;
if (noCeph === undefined && noEtcd !== undefined)
  console.log(`skipped: servers of one bucket and one etcd (${noEtcd})`);

const liveOf = ({ replicas }: { replicas: MemberStatus[] }) => replicas.filter(({ state }) => state === "live");

describe.skipIf(noCeph !== undefined)("servers of one bucket", () => {
  let ceph: Ceph;
  beforeAll(async () => {
    ceph = await startCeph();
    await ceph.createBucket("shared");
  });
  afterAll(async () => ceph?.[Symbol.asyncDispose]());

  const start = (prefix: string, ...args: string[]): Promise<Server> =>
    startServer(`s3://shared/${prefix}`, { args: ["--writable", ...args], env: ceph.env });

  async function live(server: Server, count: number): Promise<void> {
    await waitFor(`${count} are live`, async () => liveOf(await statusOf(server.address)).length === count);
  }

  /** Put through each, read from each at once, by whoever they send to. */
  async function checkShared(servers: Server[]): Promise<void> {
    for (const [number, server] of servers.entries()) {
      const put = await runClient(server.address, ["put", "-", "-t", "shared.txt"], { stdin: `by ${number}` });
      expect(put).toMatchObject({ status: 0, errors: "" });
      for (const other of servers)
        expect((await runClient(other.address, ["cat", "shared.txt"])).output).toBe(`by ${number}`);
    }
  }

  test("with --join: the master sends clients to the others, nothing is replicated, and one that dies is left out", async () => {
    await using a = await start("joined");
    await using b = await start("joined/", "--join", a.address);
    await using c = await start("joined", "--join", a.address);
    await live(a, 2);
    await checkShared([a, b, c]);
    const sent = () => new Set(a.log.filter(({ event }) => event === "redirect").map(({ to }) => to));
    await waitFor("both are logged", () => sent().size === 2);
    expect(sent()).toEqual(new Set([b.address, c.address]));
    const status = await statusOf(a.address);
    expect([status.role, status.revision]).toEqual(["master", 0]);
    await c.stop("SIGKILL");
    await live(a, 1);
    expect((await runClient(a.address, ["cat", "shared.txt"])).output).toBe("by 2");
  });

  test.skipIf(noEngine !== undefined)(
    "with etcd: all are equals, and a front without a bucket sends clients on",
    async () => {
      await using etcd = await startEtcd();
      const cluster = ["--cluster", etcd.url("bucket")];
      await using a = await start("equal", ...cluster);
      await using b = await start("equal", ...cluster);
      using nothing = temporaryFolder();
      await using front = await startServer(nothing.path, { args: ["--redirect-only", ...cluster] });
      for (const server of [a, b]) await live(server, 1);
      await live(front, 2);
      await checkShared([a, b]);
      for (let count = 0; count < 4; count++)
        expect((await runClient(front.address, ["cat", "shared.txt"])).output).toBe("by 1");
      const sent = () => front.log.filter(({ event }) => event === "redirect").map(({ to }) => to as string);
      await waitFor("all are logged", () => sent().length >= 4);
      expect(sent().slice(0, 4).sort()).toEqual([a.address, a.address, b.address, b.address].sort());
      expect(readdirSync(nothing.path)).toEqual([]);
    },
  );

  test("a server of another bucket, or of a folder, is refused, and says why", async () => {
    await using a = await start("one");
    await using other = await start("two", "--join", a.address);
    await waitFor("it knows", async () => (await statusOf(other.address)).problem?.includes("s3://shared/one"));
    using folder = makeRoot({});
    await using plain = await startServer(folder.path, { args: ["--writable", "--join", a.address] });
    await waitFor("it knows", async () => (await statusOf(plain.address)).problem?.includes("s3://shared/one"));
    expect(liveOf(await statusOf(a.address))).toEqual([]);
  });
});
