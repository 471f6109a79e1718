/** The engines that other tests stand on: that they start, work, come back with their data, and leave nothing behind. */
import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { existsSync, rmSync } from "node:fs";
import { join } from "node:path";
import { hasOpenssl } from "./certificates.ts";
import { type Ceph, type Etcd, fetchS3, noCeph, noEtcd, startCeph, startEtcd } from "./engines.ts";
import { childrenOf, isAlive, randomBytes, TEST_MS, waitFor } from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

if (noEtcd) console.log(`skipped: the tests on etcd: ${noEtcd}`);
if (noCeph) console.log(`skipped: the tests on Ceph: ${noCeph}`);

const base64 = (text: string) => Buffer.from(text).toString("base64");

/** What of etcd's answers is looked at. */
interface Answer {
  header?: { revision: string };
  kvs?: { value: string }[];
  token?: string;
  error?: string;
}

async function ask(etcd: Etcd, member: number, path: string, body: object, token?: string) {
  const response = await fetch(`${etcd.endpoints[member]}/v3/${path}`, {
    method: "POST",
    body: JSON.stringify(body),
    ...(token && { headers: { authorization: token } }),
    ...(etcd.ca && { tls: { ca: Bun.file(etcd.ca) } }),
  });
  return (await response.json()) as Answer;
}

async function readKey(etcd: Etcd, member: number, key: string): Promise<string | undefined> {
  const { kvs } = await ask(etcd, member, "kv/range", { key: base64(key), serializable: true });
  return kvs && Buffer.from(kvs[0]!.value, "base64").toString();
}

describe.skipIf(noEtcd !== undefined)("etcd", () => {
  test("tells a watch what is put", async () => {
    await using etcd = await startEtcd();
    const watch = await fetch(`${etcd.endpoints[0]}/v3/watch`, {
      method: "POST",
      body: JSON.stringify({ create_request: { key: base64("a") } }),
    });
    const reader = watch.body!.getReader();
    const created = JSON.parse(new TextDecoder().decode((await reader.read()).value));
    expect(created.result.created).toBe(true);
    await ask(etcd, 0, "kv/put", { key: base64("a"), value: base64("b") });
    const told = JSON.parse(new TextDecoder().decode((await reader.read()).value));
    expect(told.result.events[0].kv).toMatchObject({ key: base64("a"), value: base64("b") });
    expect(await readKey(etcd, 0, "a")).toBe("b");
    await reader.cancel();
  });

  test("a member that was killed comes back with what it had, and what it missed", async () => {
    await using etcd = await startEtcd({ members: 3 });
    await ask(etcd, 0, "kv/put", { key: base64("before"), value: base64("1") });
    await waitFor("all members have it", () => readKey(etcd, 2, "before"));
    await etcd.kill(2);
    await waitFor("the others agree", async () => {
      return (await ask(etcd, 0, "kv/put", { key: base64("meanwhile"), value: base64("2") })).header;
    });
    await expect(readKey(etcd, 2, "before")).rejects.toThrow();
    await etcd.restart(2);
    expect(await readKey(etcd, 2, "before")).toBe("1");
    await waitFor("it has what it missed", () => readKey(etcd, 2, "meanwhile"));
  });

  test("a member that is paused answers when it goes on, one that is stopped when it is started", async () => {
    await using etcd = await startEtcd();
    await ask(etcd, 0, "kv/put", { key: base64("a"), value: base64("1") });
    etcd.pause(0);
    let answered = false;
    const answer = readKey(etcd, 0, "a").finally(() => {
      answered = true;
    });
    expect(answered).toBe(false);
    etcd.resume(0);
    expect(await answer).toBe("1");
    await etcd.stop(0);
    await etcd.restart(0);
    expect(await readKey(etcd, 0, "a")).toBe("1");
  });

  test.skipIf(!hasOpenssl)("TLS and a password", async () => {
    await using etcd = await startEtcd({ tls: true, password: "guessed by nobody" });
    const put = { key: base64("a"), value: base64("1") };
    expect((await ask(etcd, 0, "kv/put", put)).error).toContain("user name is empty");
    const { token } = await ask(etcd, 0, "auth/authenticate", { name: "root", password: "guessed by nobody" });
    expect((await ask(etcd, 0, "kv/put", put, token)).header?.revision).toBe("2");
    expect((await ask(etcd, 0, "auth/authenticate", { name: "root", password: "?" })).error).toContain("invalid");
    await expect(fetch(`${etcd.endpoints[0]}/health`)).rejects.toThrow();
  });
});

describe.skipIf(noCeph !== undefined)("Ceph", () => {
  let ceph: Ceph;
  beforeAll(async () => {
    ceph = await startCeph();
  });
  afterAll(() => ceph[Symbol.asyncDispose]());

  test("keeps what is put, in parts or at once, and lists it", async () => {
    await ceph.createBucket("listed");
    const client = new Bun.S3Client({ ...ceph.options, bucket: "listed" });
    await client.write("folder/small", "content");
    const large = randomBytes(11 * 1024 * 1024);
    const writer = client.file("folder/large").writer({ partSize: 5 * 1024 * 1024 });
    writer.write(large);
    await writer.end();
    expect(await client.file("folder/small").text()).toBe("content");
    expect(Bun.hash(await client.file("folder/large").bytes())).toBe(Bun.hash(large));
    const { contents } = await client.list({ prefix: "folder/" });
    expect(contents!.map(({ key, size }) => [key, size])).toEqual([
      ["folder/large", large.length],
      ["folder/small", 7],
    ]);
  });

  test("refuses who has another key", async () => {
    const response = await fetchS3({ ...ceph.options, secretAccessKey: "another" }, "PUT", "/refused");
    expect([response.status, await response.text()]).toEqual([403, expect.stringContaining("SignatureDoesNotMatch")]);
  });

  test("a gateway that was killed comes back with what it had", async () => {
    await ceph.createBucket("killed");
    const file = new Bun.S3Client({ ...ceph.options, bucket: "killed" }).file("a");
    await file.write("content");
    await ceph.kill("rgw");
    await expect(file.text()).rejects.toThrow();
    await ceph.restart("rgw");
    expect(await file.text()).toBe("content");
  });
});

describe.skipIf(noEtcd !== undefined)("nothing is left running", () => {
  /** A process that starts an engine, says what runs, and waits. */
  function spawnHolder() {
    const code = `const { startEtcd } = await import(${JSON.stringify(join(import.meta.dir, "engines.ts"))});
      const etcd = await startEtcd();
      console.log(JSON.stringify([etcd.script.pid, etcd.pid(0), etcd.folder]));
      await new Promise(() => setInterval(() => {}, 1000));`;
    return Bun.spawn({ cmd: [process.execPath, "-e", code], stdio: ["ignore", "pipe", "inherit"] });
  }

  async function engineOf(holder: ReturnType<typeof spawnHolder>): Promise<[number, number, string]> {
    for await (const chunk of holder.stdout) return JSON.parse(new TextDecoder().decode(chunk));
    throw new Error("The engine did not start");
  }

  test("after the test's process was killed", async () => {
    await using holder = spawnHolder();
    const [script, member, folder] = await engineOf(holder);
    expect(childrenOf(script)).toEqual([member]);
    holder.kill("SIGKILL");
    await waitFor("all are gone", () => !isAlive(script) && !isAlive(member));
    expect(existsSync(folder)).toBe(false);
  });

  test("after the script was killed", async () => {
    await using holder = spawnHolder();
    const [script, member, folder] = await engineOf(holder);
    process.kill(script, "SIGKILL");
    await waitFor("the member is gone", () => !isAlive(member));
    holder.kill("SIGKILL");
    await holder.exited;
    rmSync(folder, { recursive: true });
  });
});
