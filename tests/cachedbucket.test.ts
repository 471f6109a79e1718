/** The cache before a real gateway of S3: what it saves, and that it never serves an older version. */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { createServer, request } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { S3Client } from "bun";
import { type Ceph, noCeph, startCeph } from "./engines.ts";
import { HOME, randomBytes, runClient, startServer, TEST_MS, temporaryFolder, waitFor, writeTree } from "./fixtures.ts";

setDefaultTimeout(TEST_MS);
if (noCeph) console.log(`skipped: the tests of a cache before a bucket: ${noCeph}`);

const MIB = 1024 * 1024;

/** A way to the gateway on which the requests are seen. */
async function startWatcher(endpoint: string) {
  const seen: string[] = [];
  const { hostname, port } = new URL(endpoint);
  const server = createServer((from, to) => {
    const { method, url: path, headers } = from;
    seen.push(`${method} ${path!.split("?")[0]}`);
    // The Host that was signed goes along.
    const ask = request({ hostname, port, method, path, headers }, (answer) => {
      to.writeHead(answer.statusCode!, answer.headers);
      answer.pipe(to);
    });
    ask.on("error", () => to.destroy());
    from.pipe(ask);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return {
    endpoint: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    /** What came since the last time. */
    take: () => seen.splice(0),
    [Symbol.dispose]: () => {
      server.closeAllConnections();
      server.close();
    },
  };
}

describe.skipIf(noCeph !== undefined)("a cache before a bucket", () => {
  let ceph: Ceph;
  beforeAll(async () => {
    ceph = await startCeph();
    await ceph.createBucket("cached");
  });
  afterAll(() => ceph?.[Symbol.asyncDispose]());

  async function startCached(prefix: string, args: string[] = []) {
    const folder = temporaryFolder();
    const watcher = await startWatcher(ceph.endpoint);
    const server = await startServer(`s3://cached/${prefix}`, {
      args: ["--cache", join(folder.path, "cache"), ...args],
      env: { ...ceph.env, AWS_ENDPOINT_URL: watcher.endpoint },
    });
    return {
      server,
      watcher,
      folder: folder.path,
      objects: new S3Client({ ...ceph.options, bucket: "cached" }),
      async [Symbol.asyncDispose]() {
        await server[Symbol.asyncDispose]();
        watcher[Symbol.dispose]();
        folder[Symbol.dispose]();
      },
    };
  }

  test("what was read is not read from the gateway again, by either worker, until it is another", async () => {
    await using cached = await startCached("hot");
    const { server, watcher, objects } = cached;
    const contents = [randomBytes(21 * MIB + 5, 1), randomBytes(21 * MIB + 5, 2)];
    const get = async (content: Uint8Array) => {
      const { status, errors, stdout } = await runClient(server.address, ["cat", "file"]);
      expect([status, errors.includes("error")]).toEqual([0, false]);
      expect(Buffer.compare(stdout, content)).toBe(0);
      return watcher.take().filter((line) => line === "GET /cached/hot/file").length;
    };
    for (const content of contents) {
      await objects.write("hot/file", content);
      // Both workers may be on their way to the same chunk.
      expect(await get(content)).toBeGreaterThanOrEqual(6);
      for (let again = 0; again < 6; again++) expect(await get(content)).toBe(0);
    }
    // And the first version again, which has the etag that it had.
    await objects.write("hot/file", contents[0]!);
    expect(await get(contents[0]!)).toBe(0);
    expect(server.log.filter(({ event }) => event === "cache" || event === "bug")).toEqual([]);
  });

  test("a server that is started again finds what the one before has kept, also after kill -9", async () => {
    using folder = temporaryFolder();
    const content = randomBytes(9 * MIB, 3);
    await new S3Client({ ...ceph.options, bucket: "cached" }).write("again/file", content);
    using watcher = await startWatcher(ceph.endpoint);
    const options = {
      args: ["--cache", join(folder.path, "cache"), "--cache-size", "64M"],
      env: { ...ceph.env, AWS_ENDPOINT_URL: watcher.endpoint },
    };
    for (const signal of ["SIGKILL", "SIGTERM", "SIGINT"] as const) {
      await using server = await startServer("s3://cached/again", options);
      const { stdout } = await runClient(server.address, ["cat", "file"]);
      expect(Buffer.compare(stdout, content)).toBe(0);
      const asked = watcher.take().filter((line) => line.startsWith("GET /cached/again/file")).length;
      expect(asked).toBe(signal === "SIGKILL" ? 3 : 0);
      await server.stop(signal);
    }
  });

  test("a cache that can't be used is said, and everything is served", async () => {
    using folder = temporaryFolder();
    writeTree(folder.path, { cache: "a file" });
    const content = randomBytes(9 * MIB, 4);
    await new S3Client({ ...ceph.options, bucket: "cached" }).write("without/file", content);
    await using server = await startServer("s3://cached/without", {
      args: ["--cache", join(folder.path, "cache"), "--workers", "1"],
      env: ceph.env,
    });
    for (let round = 0; round < 2; round++) {
      const { stdout } = await runClient(server.address, ["cat", "file"]);
      expect(Buffer.compare(stdout, content)).toBe(0);
    }
    const lines = await waitFor("it is said", () => server.log.filter(({ event }) => event === "cache"));
    expect(lines).toHaveLength(1);
  });
});

describe("options of the cache", () => {
  const wrong: Record<string, string[]> = {
    "--cache is for a bucket": ["server_root", "--cache", "somewhere"],
    "--cache-size is for --cache": ["s3://bucket", "--cache-size", "1G"],
    "--cache-size takes a size": ["s3://bucket", "--cache", "somewhere", "--cache-size", "much"],
    "--cache-size takes 64M or more": ["s3://bucket", "--cache", "somewhere", "--cache-size", "63M"],
  };
  for (const [text, args] of Object.entries(wrong))
    test(text, async () => {
      const child = Bun.spawn([process.execPath, join(HOME, "server.ts"), ...args], { cwd: HOME, stderr: "pipe" });
      const [status, errors] = await Promise.all([child.exited, new Response(child.stderr).text()]);
      expect([status, errors.includes(text)]).toEqual([2, true]);
    });
});
