/** A root on S3, on Ceph's gateway: what only a bucket does, and what is said when it can't. */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync } from "node:fs";
import { mkdir } from "node:fs/promises";
import { join } from "node:path";
import { SUM_BYTES } from "../protocol.ts";
import { S3 } from "../s3.ts";
import { type Ceph, noCeph, startCeph } from "./engines.ts";
import {
  HOME,
  isAlive,
  killHard,
  makeRoot,
  randomBytes,
  runClient,
  type Server,
  sha256,
  sizeOf,
  spawnClient,
  startServer,
  TEST_MS,
  temporaryFolder,
  waitFor,
  writeLargeFile,
} from "./fixtures.ts";
import { codeOf, Talk } from "./talk.ts";

setDefaultTimeout(2 * TEST_MS);

const MIB = 1024 * 1024;
const ID = "0123456789abcdef0123456789abcdef";

if (noCeph) console.log(`skipped: ${noCeph}`);
let ceph: Ceph;
let count = 0;
beforeAll(async () => {
  if (noCeph) return;
  ceph = await startCeph();
  await ceph.createBucket("tests");
});
afterAll(async () => {
  if (!noCeph) await ceph[Symbol.asyncDispose]();
});

interface Place extends AsyncDisposable {
  url: string;
  prefix: string;
  server: Server;
  talk: Talk;
  s3: S3;
}

function clientOf({ env }: Ceph, bucket = "tests"): S3 {
  const { AWS_ENDPOINT_URL: endpoint, AWS_ACCESS_KEY_ID: accessKeyId, AWS_SECRET_ACCESS_KEY: secretAccessKey } = env;
  return new S3({ bucket, region: env.AWS_REGION, endpoint, accessKeyId, secretAccessKey });
}

async function setUp(args: string[] = [], of: Ceph = ceph): Promise<Place> {
  const prefix = `place ${++count}/`;
  const url = `s3://tests/${prefix}`;
  const server = await startServer(url, { args: ["--writable", "--idle-timeout", "400", ...args], env: of.env });
  const talk = await Talk.to(server.port);
  // Who has not said HELLO, which goes with the first request, is not waited for so long.
  await talk.stat("");
  return {
    url,
    prefix,
    server,
    talk,
    s3: clientOf(of),
    async [Symbol.asyncDispose]() {
      talk[Symbol.dispose]();
      await server[Symbol.asyncDispose]();
    },
  };
}

/** Of processes, without what they share with others: /proc/PID/smaps_rollup. */
function ownBytes(pids: number[]): number {
  return pids.reduce((sum, pid) => {
    const rollup = readFileSync(`/proc/${pid}/smaps_rollup`, "utf8");
    const kilobytes = [...rollup.matchAll(/^Private_(?:Clean|Dirty): +(\d+) kB/gm)].map(([, text]) => Number(text));
    return sum + kilobytes.reduce((a, b) => a + b, 0) * 1024;
  }, 0);
}

/** The most that they have until `work` is done. */
async function peakOf(pids: () => number[], work: Promise<unknown>): Promise<number> {
  let peak = 0;
  let isDone = false;
  const done = work.finally(() => {
    isDone = true;
  });
  while (!isDone) {
    peak = Math.max(peak, ownBytes(pids()));
    await Promise.race([Bun.sleep(50), done.catch(() => {})]);
  }
  await done;
  return peak;
}

describe.skipIf(noCeph !== undefined)("a bucket", () => {
  test("is served to the client's get, put, sync, rm, mv and mkdir", async () => {
    await using it = await setUp();
    const { address } = it.server;
    using tree = makeRoot({ "a.txt": "a", "sub/b.txt": "b", "sub/deep/c.txt": "c" });
    using folder = temporaryFolder();
    const big = join(folder.path, "big");
    const digest = writeLargeFile(big, 40 * MIB + 1);
    const run = async (...args: string[]) => {
      const { status, errors, output } = await runClient(address, args, { cwd: folder.path });
      expect({ args, status, errors }).toEqual({ args, status: 0, errors: expect.any(String) });
      return output;
    };
    await run("put", big, "-q");
    await run("get", "big", "-o", "back", "-q");
    expect(await sha256(join(folder.path, "back"))).toBe(digest);
    await run("sync", "--up", "", tree.path, "-q");
    expect((await it.talk.names()).sort()).toEqual([
      "a.txt",
      "big",
      "sub/",
      "sub/b.txt",
      "sub/deep/",
      "sub/deep/c.txt",
    ]);
    await run("sync", "sub", join(folder.path, "local"), "-q");
    expect(await Bun.file(join(folder.path, "local/deep/c.txt")).text()).toBe("c");
    await run("mkdir", "new");
    await run("mv", "big", "new/big");
    await run("rm", "-r", "sub");
    expect(await run("ls", "-r")).toBe("a.txt\nnew/\nnew/big\n");
  });

  test("keeps what is at rest nowhere else, and its uploads out of sight until they are complete", async () => {
    await using it = await setUp();
    const content = randomBytes(24 * MIB);
    await it.talk.begin("f", content, { id: ID, size: content.length + 1 });
    await waitFor("parts are held", async () => (await it.s3.list(`${it.prefix}.reprise/`)).objects.length > 0);
    const { objects } = await it.s3.list(it.prefix);
    expect(objects.map(({ key }) => key)).toEqual([`${it.prefix}.reprise/put-${ID}`]);
    await it.talk.send(new Uint8Array(1));
    await it.talk.peer.end(content.length + 1);
    const { etag } = await it.talk.peer.expect("meta");
    const { objects: after } = await it.s3.list(it.prefix);
    expect(after).toMatchObject([{ key: `${it.prefix}f`, size: content.length + 1, etag }]);
    expect(await Array.fromAsync(it.s3.uploads(it.prefix))).toEqual([]);
  });

  test("an upload is gone on with by another server after kill -9 of the first", async () => {
    await using it = await setUp();
    using folder = temporaryFolder();
    const file = join(folder.path, "big");
    const digest = writeLargeFile(file, 120 * MIB);
    const put = spawnClient(it.server.address, [
      "put",
      file,
      "-d",
      folder.path,
      "--limit-rate",
      "16M",
      "--retries",
      "0",
      "-q",
    ]);
    const stateKey = async () => (await it.s3.list(`${it.prefix}.reprise/`)).objects[0]?.key;
    await waitFor("parts are held", stateKey);
    const killed = [it.server.process.pid, ...it.server.workers()];
    killed.forEach(killHard);
    expect(await put.exited).not.toBe(0);
    await waitFor("nobody has the port", () => killed.every((pid) => !isAlive(pid)));
    await using other = await startServer(it.url, { args: ["--writable"], env: ceph.env, port: it.server.port });
    using talk = await Talk.to(other.port);
    expect(await talk.names()).toEqual([]);
    const id = (await stateKey())!.split("put-").pop()!;
    const held = (await talk.peer.sums(id, "")).reduce((sum, { length }) => sum + length, 0);
    expect(held).toBeGreaterThan(0);
    const again = await runClient(other.address, ["put", file, "-d", folder.path, "-q"]);
    expect(again).toMatchObject({ status: 0 });
    const line = await waitFor("the put is logged", () => other.log.find((line) => line.event === "put"));
    expect(line.offset).toBe(held);
    await runClient(other.address, ["get", "big", "-o", join(folder.path, "back"), "-q"]);
    expect(await sha256(join(folder.path, "back"))).toBe(digest);
    expect(await stateKey()).toBeUndefined();
  });

  test("an upload whose client was lost in the middle of a part is gone on with before that part", async () => {
    await using it = await setUp();
    const content = randomBytes(33 * MIB);
    const options = { id: ID, size: content.length };
    {
      using lost = await Talk.to(it.server.port);
      await lost.begin("f", content.subarray(0, 18 * MIB), options);
      // The second part goes when there is more behind it.
      await waitFor("two parts are held", async () => (await it.talk.peer.sums(ID, "")).length === 2);
    }
    await waitFor("the part that was cut short is held, too", async () => {
      const state = await it.s3.readAll(`${it.prefix}.reprise/put-${ID}`);
      return state && JSON.parse(new TextDecoder().decode(state.body)).parts.length === 3;
    });
    const held = (await it.talk.peer.sums(ID, "")).reduce((sum, { length }) => sum + length, 0);
    expect(held).toBe(16 * MIB);
    await it.talk.begin("f", content.subarray(held), { ...options, offset: held });
    await it.talk.peer.end(content.length - held);
    await it.talk.peer.expect("meta");
    expect((await it.talk.get("f")).content.equals(content)).toBe(true);
    expect(await Array.fromAsync(it.s3.uploads(it.prefix))).toEqual([]);
  });

  test("what another server has gone on with, the first does not spoil", async () => {
    await using it = await setUp();
    await using other = await startServer(it.url, { args: ["--writable"], env: ceph.env });
    using elsewhere = await Talk.to(other.port);
    const content = randomBytes(40 * MIB);
    const options = { id: ID, size: content.length };
    await it.talk.begin("f", content.subarray(0, 17 * MIB), options);
    const sums = () => elsewhere.peer.sums(ID, "");
    const held = await waitFor("two parts are held", async () => {
      const bytes = (await sums()).reduce((sum, { length }) => sum + length, 0);
      return bytes === SUM_BYTES ? bytes : undefined;
    });
    await elsewhere.begin("f", content.subarray(held, 32 * MIB), { ...options, offset: held });
    using third = await Talk.to(other.port);
    await waitFor("it has gone on", async () => (await third.peer.sums(ID, "")).length > 2);
    const spoiling = randomBytes(23 * MIB, 9);
    const first = codeOf(
      it.talk
        .send(spoiling)
        .then(() => it.talk.peer.end(0))
        .then(() => it.talk.peer.expect("meta")),
    );
    expect(await first).toBe("in_use");
    await elsewhere.send(content.subarray(32 * MIB));
    await elsewhere.peer.end(content.length - held);
    const code = await codeOf(elsewhere.peer.expect("meta"));
    // The first may have sent a part in its place before it was told: then nothing of it is used.
    expect(["ok", "in_use"]).toContain(code);
    if (code === "ok") expect((await third.get("f")).content.equals(content)).toBe(true);
    else expect(await third.names()).toEqual([]);
  });

  test("an object that is replaced while it is read is `changed`, never a mix", async () => {
    await using it = await setUp(["--limit-rate", "20M"]);
    const [before, after] = [randomBytes(64 * MIB, 1), randomBytes(64 * MIB, 2)];
    await it.talk.put("f", before);
    await it.talk.peer.ask({ action: "get", path: "f", offset: 0, length: before.length, etag: "" });
    await it.talk.peer.expect("meta");
    const read = async () => {
      const { content } = await it.talk.peer.expect("data");
      const isBefore = Buffer.from(content).equals(before.subarray(at, at + content.length));
      at += content.length;
      return isBefore;
    };
    let at = 0;
    for (let chunk = 0; chunk < 5; chunk++) expect(await read()).toBe(true);
    await it.s3.put(`${it.prefix}f`, after);
    for (;;) {
      const isBefore = await read().catch((error) => error.code);
      if (isBefore === "changed") break;
      expect(isBefore).toBe(true);
    }
    expect(at).toBeLessThan(before.length);
  });

  test("is never served mixed by the client's get, which starts again", async () => {
    await using it = await setUp(["--limit-rate", "12M"]);
    using folder = temporaryFolder();
    const [before, after] = [randomBytes(64 * MIB, 1), randomBytes(64 * MIB, 2)];
    await it.talk.put("f", before);
    const back = join(folder.path, "back");
    const get = spawnClient(it.server.address, ["get", "f", "-o", back]);
    await waitFor("some of it is here", () => sizeOf(`${back}.part`) > MIB);
    // However long the other version takes to get there, what is read ahead of this one has an end before.
    get.kill("SIGSTOP");
    await it.s3.put(`${it.prefix}f`, after);
    get.kill("SIGCONT");
    expect(await get.exited).toBe(0);
    expect(await sha256(back)).toBe(new Bun.CryptoHasher("sha256").update(after).digest("hex"));
  });

  test("keys that are no path are left out, and said once", async () => {
    await using it = await setUp(["--workers", "1"]);
    const odd = ["a//b", "/x", "new\nline", "z".repeat(256)];
    for (const key of odd) await it.s3.put(it.prefix + key, "odd");
    for (const key of ["ok", "d/f", "both", "both/below", "both-and", "x.part", ".reprise-x"])
      await it.s3.put(it.prefix + key, key);
    const shown = ["a/", "both", "both-and", "d/", "d/f", "ok"];
    expect(await it.talk.names()).toEqual(shown);
    expect(await it.talk.names()).toEqual(shown);
    expect(await it.talk.names("", false)).toEqual(shown.filter((name) => name !== "d/f"));
    expect(await it.talk.names("a")).toEqual([]);
    expect(await codeOf(it.talk.get("a//b"))).toBe("bad_name");
    expect(await codeOf(it.talk.list("both"))).toBe("not_a_folder");
    const said = () => it.server.log.filter((line) => line.event === "storage").map(({ path }) => path);
    await waitFor("they are said", () => odd.every((key) => said().includes(it.prefix + key)));
    expect(new Set(said()).size).toBe(said().length);
    await it.talk.remove("a", true);
    expect(await it.talk.names("", false)).toEqual(["both", "both-and", "d/", "ok"]);
  });

  test("what others have put has their times, as far as they say any", async () => {
    await using it = await setUp();
    await it.s3.put(`${it.prefix}rclone`, "x", { mtime: "1700000000.123456789" });
    await it.s3.put(`${it.prefix}s3fs`, "x", { mtime: "1700000000" });
    await it.s3.put(`${it.prefix}none`, "x");
    await it.s3.put(`${it.prefix}odd`, "x", { mtime: "yesterday" });
    const times = Object.fromEntries((await it.talk.list()).map(({ path, mtime }) => [path, mtime]));
    expect(times).toMatchObject({ rclone: 1_700_000_000_123_456, s3fs: 1_700_000_000_000_000 });
    for (const name of ["none", "odd"]) {
      expect(Math.abs(times[name]! / 1000 - Date.now())).toBeLessThan(3600_000);
      expect((await it.talk.stat(name)).mtime).toBe(times[name]!);
    }
  });

  test("what was given up a week ago is swept, and nothing else", async () => {
    await using it = await setUp();
    const { openBucket } = await import("../bucket.ts");
    const { openBucketChanges } = await import("../bucketput.ts");
    await it.talk.put("f", "stays");
    using lost = await Talk.to(it.server.port);
    await lost.begin("g", randomBytes(17 * MIB), { id: ID, size: 40 * MIB });
    await waitFor("parts are held", async () => (await it.talk.peer.sums(ID, "")).length > 0);
    const orphan = await it.s3.createUpload(`${it.prefix}orphan`, "0");
    lost.peer.close();
    // What it still notes of the upload would else come behind the sweep.
    await waitFor("the server has left it", () =>
      it.server.log.some(({ event, path }) => event === "put" && path === "g"),
    );
    const changes = openBucketChanges(openBucket(it.url, { env: ceph.env }));
    const isBegun = async () => (await Array.fromAsync(it.s3.uploads(it.prefix))).map(({ key }) => key).sort();
    await changes.sweep();
    expect(await isBegun()).toEqual([`${it.prefix}g`, `${it.prefix}orphan`]);
    await changes.sweep(Date.now() + 8 * 24 * 3600 * 1000);
    expect(await isBegun()).toEqual([]);
    expect((await it.s3.list(it.prefix)).objects.map(({ key }) => key)).toEqual([`${it.prefix}f`]);
    expect(orphan).not.toBe("");
  });
});

describe.skipIf(noCeph !== undefined)("memory", () => {
  test("200 downloads side by side take 256 MiB of all processes together", async () => {
    await using it = await setUp();
    const content = randomBytes(6 * MIB);
    await it.talk.put("f", content);
    const sum = Bun.hash.crc32(content);
    const talks = await Promise.all(Array.from({ length: 200 }, () => Talk.to(it.server.port)));
    const work = Promise.all(talks.map((talk) => downloadSlowly(talk, content.length)));
    const pids = () => [it.server.process.pid, ...it.server.workers()];
    const peak = await peakOf(pids, work);
    expect(new Set(await work)).toEqual(new Set([sum]));
    console.log(`200 downloads: ${Math.round(peak / MIB)} MiB`);
    expect(peak).toBeLessThan(256 * MIB);
    for (const talk of talks) talk.peer.close();
  });

  test("60,000 keys are listed in little of it", async () => {
    // Ceph would take some minutes to be given as many: pages of a list, and times, are made up as they are asked for.
    using gateway = fakeGateway(60_000);
    const env = { ...ceph.env, AWS_ENDPOINT_URL: gateway.url };
    await using server = await startServer("s3://tests", { args: ["--workers", "1"], env });
    using talk = await Talk.to(server.port);
    const [worker] = server.workers();
    const before = ownBytes([worker!]);
    const list = async () => {
      let entries = 0;
      await talk.peer.ask({ action: "list", path: "", recursive: true });
      for (let next = await nextOf(talk); next.type === "entries"; next = await nextOf(talk))
        entries += next.entries.length;
      return entries;
    };
    const work = list();
    const peak = await peakOf(() => [worker!], work);
    expect(await work).toBe(60_100);
    console.log(`60,000 keys: ${Math.round((peak - before) / MIB)} MiB more`);
    expect(peak - before).toBeLessThan(96 * MIB);
    expect(gateway.heads()).toBe(60_000);
    // What was told of a version is not asked for again, as far as it is remembered.
    expect(await list()).toBe(60_100);
    expect(gateway.heads()).toBeLessThan(60_100);
  });
});

/** As much of S3 as a list takes, with so many keys in a hundred folders. */
function fakeGateway(keys: number) {
  const MODIFIED = "2026-01-02T03:04:05.000Z";
  const keyOf = (index: number) => `folder ${String(index % 100).padStart(2, "0")}/a name of usual length ${index}`;
  const all = Array.from({ length: keys }, (_, index) => keyOf(index)).sort();
  let heads = 0;
  const server = Bun.serve({
    hostname: "127.0.0.1",
    port: 0,
    fetch(request) {
      const { searchParams } = new URL(request.url);
      if (request.method === "HEAD") {
        heads++;
        const headers = { etag: '"e"', "last-modified": new Date(MODIFIED).toUTCString(), "x-amz-meta-mtime": "1.5" };
        return new Response(null, { headers: { ...headers, "content-length": "0" } });
      }
      const from = Number(searchParams.get("continuation-token") ?? 0);
      const most = Number(searchParams.get("max-keys") ?? 1000);
      const contents = all
        .slice(from, from + most)
        .map(
          (key) =>
            `<Contents><Key>${encodeURIComponent(key)}</Key><LastModified>${MODIFIED}</LastModified><ETag>&quot;e&quot;</ETag><Size>0</Size></Contents>`,
        );
      const isCut = from + most < keys;
      const next = isCut ? `<NextContinuationToken>${from + most}</NextContinuationToken>` : "";
      return new Response(
        `<ListBucketResult><EncodingType>url</EncodingType><IsTruncated>${isCut}</IsTruncated>${next}${contents.join("")}</ListBucketResult>`,
      );
    },
  });
  const url = `http://127.0.0.1:${server.port}`;
  return { url, heads: () => heads, [Symbol.dispose]: () => void server.stop(true) };
}

const nextOf = (talk: Talk) => talk.peer.expect("entries", "end");

async function downloadSlowly(talk: Talk, size: number): Promise<number> {
  await talk.peer.ask({ action: "get", path: "f", offset: 0, length: size, etag: "" });
  await talk.peer.expect("meta");
  let sum = 0;
  for (;;) {
    const next = await talk.peer.expect("data", "end");
    if (next.type === "end") return sum;
    sum = Bun.hash.crc32(next.content, sum);
  }
}

describe.skipIf(noCeph !== undefined)("what is wrong", () => {
  async function startWrong(url: string, env: Record<string, string>) {
    const cmd = [process.execPath, join(HOME, "server.ts"), url, "--port", "0", "--workers", "1"];
    const child = Bun.spawn({ cmd, env: { ...process.env, ...env }, stdio: ["ignore", "pipe", "pipe"] });
    const [errors, output, status] = await Promise.all([
      new Response(child.stderr).text(),
      new Response(child.stdout).text(),
      child.exited,
    ]);
    return { errors, output, status };
  }

  test.each([
    ["no such bucket", "s3://nothing-here", {}, 'there is no bucket "nothing-here"'],
    ["another key", "s3://tests", { AWS_ACCESS_KEY_ID: "nobody" }, "knows no such credentials (InvalidAccessKeyId)"],
    [
      "another secret",
      "s3://tests",
      { AWS_SECRET_ACCESS_KEY: "x" },
      "knows no such credentials (SignatureDoesNotMatch)",
    ],
    ["nobody there", "s3://tests", { AWS_ENDPOINT_URL: "http://127.0.0.1:1" }, "http://127.0.0.1:1 does not answer"],
  ])("is said at the start, with status 1: %s", async (_, url, env, text) => {
    const { status, errors, output } = await startWrong(url, { ...ceph.env, ...env });
    expect(errors).toContain(text);
    expect({ status, output }).toEqual({ status: 1, output: "" });
  });

  test.each([
    ["s3://tests", { AWS_ACCESS_KEY_ID: "" }, "AWS_ACCESS_KEY_ID"],
    ["s3://", {}, "is not s3://BUCKET"],
    ["s3://tests/a//b", {}, "is not s3://BUCKET"],
    ["s3://tests/.reprise", {}, "is not s3://BUCKET"],
    ["s3://tests", { AWS_ENDPOINT_URL: "localhost:80" }, "AWS_ENDPOINT_URL"],
  ])("is a wrong usage: %s %j", async (url, env, text) => {
    const { status, errors } = await startWrong(url, { ...ceph.env, ...env });
    expect(errors).toContain(text);
    expect(status).toBe(2);
  });

  test("a gateway that goes away makes requests wait, and is in the status until it is back", async () => {
    await using own = await startCeph();
    await own.createBucket("tests");
    await using it = await setUp([], own);
    const content = randomBytes(20 * MIB);
    await it.talk.put("f", content);
    await own.kill("rgw");
    expect(await codeOf(it.talk.stat("f"))).toBe("busy");
    using talk = await Talk.to(it.server.port);
    expect((await talk.status()).problem).toContain("cannot be reached");
    // It ends the connection: what is behind it is asked for again, and so must not have been made.
    for (const path of ["one", "two"]) await talk.peer.ask({ action: "mkdir", path, parents: false });
    expect(await codeOf(talk.peer.expect("end"))).toBe("busy");
    expect(await codeOf(talk.peer.expect("end"))).toBe("lost");
    using small = await Talk.to(it.server.port);
    expect(await codeOf(small.put("g", "content", { whole: true }))).toBe("busy");
    using folder = temporaryFolder();
    await mkdir(join(folder.path, "logs"));
    const back = join(folder.path, "back");
    const file = join(folder.path, "file");
    const digest = writeLargeFile(file, 12 * MIB);
    const get = runClient(it.server.address, ["get", "f", "-o", back, "-q"]);
    const put = runClient(it.server.address, ["put", file, "-d", join(folder.path, "logs"), "-q"]);
    const busy = () => it.server.log.filter((line) => line.status === "busy").length;
    await waitFor("both are told so", () => busy() >= 4);
    await own.restart("rgw");
    expect(await get).toMatchObject({ status: 0 });
    expect(await put).toMatchObject({ status: 0 });
    expect(await sha256(back)).toBe(new Bun.CryptoHasher("sha256").update(content).digest("hex"));
    using after = await Talk.to(it.server.port);
    expect((await after.status()).problem).toBeUndefined();
    expect(new Bun.CryptoHasher("sha256").update((await after.get("file")).content).digest("hex")).toBe(digest);
    // One that is there and says nothing is found out as well, before the client gives up on us.
    own.pause("rgw");
    expect(await codeOf(after.stat("f"))).toBe("busy");
    using last = await Talk.to(it.server.port);
    expect((await last.status()).problem).toContain("no answer in time");
    own.resume("rgw");
    using end = await Talk.to(it.server.port);
    expect((await end.stat("f")).size).toBe(content.length);
  });
});
