/** The cache before a real gateway of S3: what it saves, and that it never serves an older version. */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { chmodSync, rmSync, writeFileSync } from "node:fs";
import { createServer, request } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { S3Client } from "bun";
import { type Ceph, noCeph, startCeph } from "./engines.ts";
import {
  HOME,
  killWorkers,
  mountSmall,
  randomBytes,
  runClient,
  startServer,
  TEST_MS,
  temporaryFolder,
  waitFor,
  writeTree,
} from "./fixtures.ts";
import { Gateway } from "./gateway.ts";

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
    await server.stop("SIGTERM");
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
});

describe("a cache that can't be used", () => {
  const content = randomBytes(5 * MIB, 4);

  function startWith(gateway: Gateway, cache: string) {
    const cmd = [process.execPath, join(HOME, "server.ts"), "s3://tests", "--port", "0", "--cache", cache];
    return Bun.spawn({ cmd, env: { ...process.env, ...gateway.env }, stdio: ["ignore", "pipe", "pipe"] });
  }

  const wrong: Record<string, [text: string, make: (folder: string) => string]> = {
    "a file": ["ENOTDIR", (folder) => join(folder, "file")],
    "a folder in a file": ["ENOTDIR", (folder) => join(folder, "file", "cache")],
    "a folder into which others may write": ["others may write there", (folder) => join(folder, "open")],
    "a folder of which a part is something else": ["EISDIR", (folder) => join(folder, "odd")],
    ...(process.getuid!() !== 0 && {
      "a folder that is not ours to write": ["EACCES", (folder: string) => join(folder, "closed")],
      "a folder in one that is not ours to write": ["EACCES", (folder: string) => join(folder, "closed", "cache")],
    }),
  };
  test.each(Object.entries(wrong))("is an error at the start, with status 7: %s", async (_, [text, make]) => {
    using folder = temporaryFolder();
    using gateway = new Gateway();
    writeTree(folder.path, { file: "a file", "open/": "", "closed/": "", "odd/usage/": "" });
    chmodSync(join(folder.path, "open"), 0o777);
    chmodSync(join(folder.path, "closed"), 0o500);
    const child = startWith(gateway, make(folder.path));
    const [status, errors, output] = await Promise.all([
      child.exited,
      new Response(child.stderr).text(),
      new Response(child.stdout).text(),
    ]);
    expect({ status, output, errors }).toEqual({ status: 7, output: "", errors: expect.stringContaining(text) });
    expect(errors).toContain(make(folder.path));
    expect(gateway.asked).toEqual([]);
  });

  const small = process.getuid!() === 0 ? mountSmall("200K") : undefined;
  afterAll(() => small?.[Symbol.dispose]());

  test.skipIf(!small)("is none of that where the disk is only full", async () => {
    using gateway = new Gateway();
    gateway.set("file", content);
    // Not even a name has room.
    for (let at = 0; !isFull(join(small!.path, `f${at}`)); at++);
    await using server = await startServer("s3://tests", {
      args: ["--cache", join(small!.path, "cache"), "--workers", "1"],
      env: gateway.env,
    });
    expect(Buffer.compare((await runClient(server.address, ["cat", "file"])).stdout, content)).toBe(0);
    await waitFor("it is said", () =>
      server.log.some(({ event, status }) => event === "cache" && /ENOSPC/.test(status)),
    );
  });

  test("any more is said once, and everything is served", async () => {
    using folder = temporaryFolder();
    using gateway = new Gateway();
    const path = join(folder.path, "cache");
    for (const name of ["one", "two"]) gateway.set(name, content);
    await using server = await startServer("s3://tests", {
      args: ["--cache", path, "--workers", "1"],
      env: gateway.env,
    });
    const get = async (name: string) => (await runClient(server.address, ["cat", name])).stdout;
    expect(Buffer.compare(await get("one"), content)).toBe(0);
    rmSync(path, { recursive: true });
    writeFileSync(path, "a file");
    for (const name of ["one", "two", "one", "two"]) expect(Buffer.compare(await get(name), content)).toBe(0);
    const said = () => server.log.filter(({ event }) => event === "cache");
    expect(await waitFor("it is said", () => (said().length > 0 ? said() : undefined))).toHaveLength(1);
    // Nor does a worker that is started now fail over it.
    await killWorkers(server);
    expect(Buffer.compare(await get("two"), content)).toBe(0);
  });
});

/** Whether nothing more can be written there. */
function isFull(path: string): boolean {
  try {
    writeFileSync(path, new Uint8Array(4096));
    return false;
  } catch {
    return true;
  }
}

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
