/** A root on S3 against a bucket in memory: what else happens at just that moment, and what real engines do too rarely. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { join } from "node:path";
import { Bucket } from "../bucket.ts";
import { openBucketChanges } from "../bucketput.ts";
import type { Changes, Upload } from "../changes.ts";
import { type Put, UNKNOWN_SIZE } from "../protocol.ts";
import { type ListedObject, type ObjectInfo, type Part, type PutConditions, S3, S3Error } from "../s3.ts";
import { addToken } from "../tokens.ts";
import { startServer, TEST_MS, temporaryFolder, waitFor } from "./fixtures.ts";
import { codeOf, Talk } from "./talk.ts";

setDefaultTimeout(TEST_MS);

const MIB = 1024 * 1024;
const ID = "0123456789abcdef0123456789abcdef";
const md5 = (content: Uint8Array) => new Bun.CryptoHasher("md5").update(content).digest("hex");

interface Held {
  content: Uint8Array;
  etag: string;
  mtime: string | undefined;
  modifiedMs: number;
}

/** As much of S3 as changes need. */
class MemoryS3 {
  readonly settings = { bucket: "memory" };
  readonly address = "memory";
  readonly objects = new Map<string, Held>();
  readonly parts = new Map<string, { key: string; parts: Map<number, Held> }>();
  puts = 0;
  isEncrypted = false;
  /** Conditions of a copy; undefined: it refuses them. */
  knowsCopies: boolean | undefined = true;
  begun = 0;
  /** Of all uploads. */
  begunMs = Date.now();
  /** When something was written last: a second passes with each, as S3 tells no less. */
  nowMs = 0;
  /** Is called before each request, with its name and key. */
  before: (name: string, key: string) => void = () => {};

  set(key: string, content: Uint8Array | string, mtime?: string): string {
    const bytes = Buffer.from(content);
    this.objects.set(key, { content: bytes, etag: md5(bytes), mtime, modifiedMs: this.#tick() });
    return md5(bytes);
  }

  #tick(): number {
    this.nowMs += 1000;
    return this.nowMs;
  }

  get keys(): string[] {
    return [...this.objects.keys()].sort();
  }

  async list(prefix: string, { max = 1000, startAfter = "", token = "" } = {}) {
    this.before("list", prefix);
    const keys = this.keys.filter((key) => key.startsWith(prefix) && key > startAfter && key > token);
    const objects = keys.slice(0, max).map((key): ListedObject => {
      const { content, etag } = this.objects.get(key)!;
      return { key, size: content.length, etag, modified: new Date().toISOString() };
    });
    return { objects, prefixes: [], next: keys.length > max ? objects.at(-1)!.key : undefined };
  }

  async head(key: string): Promise<ObjectInfo | undefined> {
    this.before("head", key);
    const held = this.objects.get(key);
    return held && { size: held.content.length, etag: held.etag, modifiedMs: held.modifiedMs, mtime: held.mtime };
  }

  async readAll(key: string) {
    const held = this.objects.get(key);
    return held && { etag: held.etag, body: held.content };
  }

  async put(
    key: string,
    body: Uint8Array | string,
    { mtime, ifMatch, ifNoneMatch }: { mtime?: string } & PutConditions = {},
  ): Promise<string> {
    this.before("put", key);
    const etag = this.objects.get(key)?.etag;
    const isRight = (!ifMatch || etag === ifMatch) && (!ifNoneMatch || etag === undefined);
    if (!isRight) throw new S3Error("PreconditionFailed", 412, "another");
    this.puts++;
    return this.set(key, body, mtime);
  }

  async remove(key: string): Promise<void> {
    this.before("remove", key);
    this.objects.delete(key);
  }

  async removeAll(keys: string[]): Promise<void> {
    for (const key of keys) await this.remove(key);
  }

  async copy(from: string, etag: string, to: string, { ifNoneMatch }: PutConditions = {}): Promise<void> {
    this.before("copy", from);
    const held = this.objects.get(from);
    if (ifNoneMatch && this.knowsCopies === undefined) throw new S3Error("NotImplemented", 501, "no such header");
    if (ifNoneMatch && this.knowsCopies && this.objects.has(to)) throw new S3Error("PreconditionFailed", 412, "there");
    if (held?.etag !== etag) throw new S3Error("PreconditionFailed", 412, "another");
    this.objects.set(to, { ...held, modifiedMs: this.#tick() });
  }

  async createUpload(key: string): Promise<string> {
    const id = `upload-${++this.begun}`;
    this.parts.set(id, { key, parts: new Map() });
    return id;
  }

  async *uploads() {
    for (const [uploadId, { key }] of this.parts) yield { key, uploadId, begunMs: this.begunMs };
  }

  async putPart(_key: string, id: string, number: number, content: Uint8Array): Promise<string> {
    const upload = this.parts.get(id);
    if (!upload) throw new S3Error("NoSuchUpload", 404, "no such upload");
    upload.parts.set(number, { content: content.slice(), etag: md5(content), mtime: undefined, modifiedMs: 0 });
    return md5(content);
  }

  async completeUpload(key: string, id: string, parts: Part[]): Promise<string> {
    this.before("complete", key);
    const upload = this.parts.get(id);
    if (!upload) throw new S3Error("NoSuchUpload", 404, "no such upload");
    const held = parts.map(({ number }) => upload.parts.get(number)!);
    const etags = Buffer.concat(held.map(({ etag }) => Buffer.from(etag, "hex")));
    const etag = `${this.isEncrypted ? "opaque" : md5(etags)}-${held.length}`;
    const content = Buffer.concat(held.map(({ content }) => content));
    this.objects.set(key, { content, etag, mtime: undefined, modifiedMs: this.#tick() });
    this.parts.delete(id);
    return etag;
  }

  async abortUpload(_key: string, id: string): Promise<void> {
    this.parts.delete(id);
  }
}

function setUp() {
  const s3 = new MemoryS3();
  const bucket = new Bucket(s3 as unknown as S3, "", {});
  return { s3, bucket, changes: openBucketChanges(bucket) };
}

const putOf = (path: string, more: Partial<Put> = {}): Put => ({
  action: "put",
  path,
  size: UNKNOWN_SIZE,
  offset: 0,
  mtime: 1_000_000,
  id: "",
  etag: "",
  noClobber: false,
  parents: false,
  ...more,
});

/** All of what is sent, but for its name. */
async function send(changes: Changes, put: Put, content: Uint8Array): Promise<Upload> {
  const upload = await changes.receive(put, false);
  try {
    await upload.append(content, Bun.hash.crc32(content), () => {});
    await upload.settle();
    return upload;
  } catch (error) {
    upload.close();
    throw error;
  }
}

/** Minutes if each were compared with all before it. */
test("300,000 files in one folder are listed in the time that they take", async () => {
  const pages = 300;
  const s3 = {
    list: async (_prefix: string, { token = "0" }: { token?: string }) => ({
      objects: Array.from({ length: 1000 }, (_, index) => ({
        key: `file ${String(Number(token) * 1000 + index).padStart(6, "0")}`,
        size: 1,
        etag: "e",
        modified: "",
      })),
      prefixes: [],
      next: Number(token) + 1 < pages ? String(Number(token) + 1) : undefined,
    }),
    head: async () => ({ size: 1, etag: "e", modifiedMs: 0, mtime: undefined }),
  };
  let files = 0;
  for await (const entries of new Bucket(s3 as unknown as S3, "", {}).root.list("", true)) files += entries.length;
  expect(files).toBe(pages * 1000);
});

test("a move of a folder takes away nothing that came while it was going on", async () => {
  const { s3, changes } = setUp();
  for (const name of ["a", "b", "c"]) s3.set(`from/${name}`, name);
  s3.before = (name, key) => {
    if (name !== "copy" || key !== "from/c") return;
    s3.set("from/new", "came later");
    s3.set("from/a", "another a");
  };
  expect(await changes.apply([{ action: "move", path: "from", to: "to", overwrite: false }])).toEqual([undefined]);
  expect(s3.keys).toEqual(["from/a", "from/new", "to/a", "to/b", "to/c"]);
  expect(s3.objects.get("from/a")!.content.toString()).toBe("another a");
});

test("a move of a file takes away no other that has come in its place", async () => {
  const { s3, changes } = setUp();
  s3.set("from", "one");
  s3.before = (name) => {
    if (name !== "copy") return;
    s3.before = (name) => {
      if (name === "head") s3.set("from", "two");
    };
  };
  expect(await changes.apply([{ action: "move", path: "from", to: "to", overwrite: false }])).toEqual([undefined]);
  const contents = s3.keys.map((key) => `${key}: ${s3.objects.get(key)!.content}`);
  expect(contents).toEqual(["from: two", "to: one"]);
});

test("a move that was cut, wherever that was, is done by the same move again", async () => {
  const files = ["from/", "from/a", "from/b", "from/d/", "from/d/c", "from/e"];
  const move = { action: "move", path: "from", to: "to", overwrite: false } as const;
  const one = { ...move, path: "from/a", to: "b" };
  for (const change of [move, one]) {
    for (let end = 0; ; end++) {
      const { s3, changes } = setUp();
      for (const key of files) s3.set(key, key.endsWith("/") ? "" : key, "1.5");
      let changed = 0;
      s3.before = (name) => {
        if (!["copy", "remove", "put"].includes(name)) return;
        if (changed++ === end) throw new S3Error("Unreachable", 0, "the server has died");
      };
      const [outcome] = await changes.apply([change]);
      const isDone = outcome === undefined;
      s3.before = () => {};
      const all = () =>
        new Set(s3.keys.filter((key) => !key.endsWith("/")).map((key) => s3.objects.get(key)!.content.toString()));
      expect(all()).toEqual(new Set(["from/a", "from/b", "from/d/c", "from/e"]));
      const isMoved = !s3.keys.includes("from/a") && !s3.keys.some((key) => change === move && key.startsWith("from/"));
      const onlyFolders = s3.keys.every((key) => !key.startsWith("to/") || key.endsWith("/"));
      const isSaidTaken = change === move && s3.keys.includes("to/") && onlyFolders;
      const expected = isSaidTaken ? { code: "exists" } : isMoved && !isDone ? { code: "not_found" } : undefined;
      if (!isDone)
        expect([end, (await changes.apply([change]))[0]]).toEqual([end, expected && expect.objectContaining(expected)]);
      if (!isSaidTaken && change === move) expect(s3.keys).toEqual(files.map((key) => key.replace("from/", "to/")));
      if (!isSaidTaken && change === one)
        expect([s3.keys.includes("from/a"), s3.keys.includes("b")]).toEqual([false, true]);
      expect(all().size).toBe(4);
      if (isDone) break;
    }
  }
});

test("a move is none that was cut where there is anything else, and then nothing is touched", async () => {
  const move = (path: string, to: string, overwrite = false) => ({ action: "move", path, to, overwrite }) as const;
  const cases: [string[], string[]][] = [
    // Each has something that the other has not.
    [
      ["a", "b"],
      ["a", "c"],
    ],
    [["a", "b"], ["a other content"]],
    [["a", "b"], ["a other time"]],
    [["a"], ["c"]],
    [
      ["a", "d/"],
      ["a", "b"],
    ],
    // Folders without files tell nothing.
    [
      ["", "d/"],
      ["", "d/", "a"],
    ],
    [["a"], [""]],
  ];
  for (const [from, to] of cases) {
    const { s3, changes } = setUp();
    for (const name of from) s3.set(`from/${name}`, name === "" || name.endsWith("/") ? "" : name, "1.5");
    for (const text of to) {
      const [name = "", kind] = text.split(" ");
      s3.set(
        `to/${name}`,
        kind === "other" && text.endsWith("content") ? "x" : name.endsWith("/") ? "" : name,
        text.endsWith("time") ? "2.5" : "1.5",
      );
    }
    const before = JSON.stringify([...s3.objects]);
    expect([from, to, ...(await changes.apply([move("from", "to")]))]).toMatchObject([from, to, { code: "exists" }]);
    expect(JSON.stringify([...s3.objects])).toBe(before);
  }
  const { s3, changes } = setUp();
  s3.set("f", "one", "1.5");
  s3.set("g", "one", "2.5");
  expect(await changes.apply([move("f", "g"), move("f", "f")])).toMatchObject([{ code: "exists" }, { code: "exists" }]);
  // Of what came in one second, either may be the copy.
  s3.nowMs = 0;
  s3.set("h", "one", "1.5");
  expect(await changes.apply([move("f", "h"), move("h", "f")])).toMatchObject([{ code: "exists" }, { code: "exists" }]);
  expect(s3.keys).toEqual(["f", "g", "h"]);
});

test("a move back, while the move is under way or was cut, leaves one of both copies", async () => {
  const move = (path: string, to: string) => ({ action: "move", path, to, overwrite: false }) as const;
  for (const [path, to] of [
    ["from", "to"],
    ["from/a", "b"],
  ] as const) {
    for (const name of ["copy", "remove"] as const) {
      const { s3, changes } = setUp();
      for (const key of ["from/a", "from/b", "from/c"]) s3.set(key, key, "1.5");
      const request = s3[name].bind(s3) as (...args: unknown[]) => Promise<void>;
      let asked = 0;
      const back: unknown[] = [];
      s3[name] = async (...args: unknown[]) => {
        const isTurn = ++asked === (name === "copy" && path === "from" ? 3 : 1);
        if (isTurn) back.push(...(await changes.apply([move(to, path)])));
        return request(...args);
      };
      const done = await changes.apply([move(path, to)]);
      const contents = new Set([...s3.objects.values()].map(({ content }) => content.toString()));
      expect([path, name, back.length, contents]).toEqual([path, name, 1, new Set(["from/a", "from/b", "from/c"])]);
      const code = name === "copy" && path !== "from" ? "not_found" : "exists";
      expect([done, back]).toMatchObject([[undefined], [{ code }]]);
    }
  }
});

test("a move of a file replaces none that has come meanwhile, where the gateway looks for it", async () => {
  for (const knows of [true, false, undefined]) {
    const { s3, changes } = setUp();
    s3.knowsCopies = knows;
    const move = (overwrite: boolean) => changes.apply([{ action: "move", path: "from", to: "to", overwrite }]);
    s3.set("from", "one");
    if (knows) {
      s3.before = (name) => {
        if (name === "copy") s3.set("to", "two");
      };
      expect(await move(false)).toMatchObject([{ code: "exists" }]);
      expect(s3.keys.map((key) => `${key}: ${s3.objects.get(key)!.content}`)).toEqual(["from: one", "to: two"]);
    }
    s3.before = () => {};
    expect(await move(knows === true)).toEqual([undefined]);
    expect(s3.keys.map((key) => `${key}: ${s3.objects.get(key)!.content}`)).toEqual(["to: one"]);
  }
});

test("a move of a file whose copy was not heard of is done", async () => {
  const { s3, changes } = setUp();
  const copy = s3.copy.bind(s3);
  s3.copy = async (...args) => {
    await copy(...args);
    throw Object.assign(new S3Error("PreconditionFailed", 412, "it is there"), { isRetried: true });
  };
  s3.set("from", "one", "1.5");
  expect(await changes.apply([{ action: "move", path: "from", to: "to", overwrite: false }])).toEqual([undefined]);
  expect(s3.keys).toEqual(["to"]);
});

test("the folder that somebody's token is for stays when the last file in it goes", async () => {
  const { s3, changes } = setUp();
  s3.set("one/f", "x");
  const own = changes.beneath("one");
  expect(await own.apply([{ action: "remove", path: "f", recursive: false }])).toEqual([undefined]);
  expect(s3.keys).toEqual(["one/"]);
  s3.set("top", "x");
  await changes.apply(["one", "top"].map((path) => ({ action: "remove", path, recursive: true })));
  expect(s3.keys).toEqual([]);
});

test("of changes that come together the later ones see the folders that the earlier ones have made", async () => {
  const { s3, changes } = setUp();
  const mkdir = (path: string, parents: boolean) => ({ action: "mkdir", path, parents }) as const;
  expect(await changes.apply([mkdir("a/b/c", true), mkdir("a/d", false)])).toEqual([undefined, undefined]);
  s3.set("f", "x");
  const remove = { action: "remove", path: "f", recursive: false } as const;
  const [refused, ...made] = await changes.apply([
    mkdir("f/g", false),
    remove,
    mkdir("f/g/h", true),
    mkdir("f/i", false),
  ]);
  expect(refused).toMatchObject({ code: "not_a_folder" });
  expect(made).toEqual([undefined, undefined, undefined]);
  expect(s3.keys).toEqual(["a/b/c/", "a/d/", "f/g/h/", "f/i/"]);
});

test("an upload that the bucket has given up begins anew", async () => {
  const { s3, changes } = setUp();
  const content = Buffer.alloc(17 * MIB, "x");
  const put = putOf("f", { id: ID, size: content.length });
  const upload = await changes.receive(put, false);
  const first = content.subarray(0, 9 * MIB);
  await upload.append(first, Bun.hash.crc32(first), () => {});
  upload.close();
  const held = async () => (await Array.fromAsync(changes.sums(ID))).reduce((sum, { length }) => sum + length, 0);
  expect(await held()).toBe(8 * MIB);
  // By a rule of the bucket, for uploads that are not completed.
  s3.parts.clear();
  const rest = send(changes, { ...put, offset: 8 * MIB }, content.subarray(8 * MIB));
  expect(await rest.catch(({ code }) => code)).toBe("bad_range");
  expect(await held()).toBe(0);
  expect(await changes.apply([await send(changes, put, content)])).toMatchObject([{ size: content.length }]);
  expect(s3.keys).toEqual(["f"]);
});

test("an upload that another server has begun anew is left to that one", async () => {
  const { s3, bucket, changes } = setUp();
  const content = Buffer.alloc(17 * MIB, "x");
  const put = putOf("f", { id: ID, size: content.length });
  const first = content.subarray(0, 9 * MIB);
  const mine = await changes.receive(put, false);
  await mine.append(first, Bun.hash.crc32(first), () => {});
  await waitFor("a part is held", () => s3.keys.length === 1);
  const others = openBucketChanges(bucket);
  const theirs = await others.receive(put, false);
  await theirs.append(first, Bun.hash.crc32(first), () => {});
  await waitFor("they hold one", () => s3.puts === 2);
  const rest = content.subarray(9 * MIB);
  const lost = mine.append(rest, Bun.hash.crc32(rest), () => {}).then(() => mine.settle());
  expect(await lost.catch(({ code }) => code)).toBe("bad_range");
  mine.close();
  await theirs.append(rest, Bun.hash.crc32(rest), () => {});
  await theirs.settle();
  expect(s3.keys).toEqual([`.reprise/put-${ID}`]);
  expect(await others.apply([theirs])).toMatchObject([{ size: content.length }]);
});

test("an upload that was begun more than a week ago and gone on with since is not swept", async () => {
  const { s3, changes } = setUp();
  const content = Buffer.alloc(17 * MIB, "x");
  const put = putOf("f", { id: ID, size: content.length });
  const upload = await changes.receive(put, false);
  await upload.append(content, Bun.hash.crc32(content), () => {});
  await upload.settle();
  const givenUp = await s3.createUpload("g");
  s3.begunMs = Date.now() - 8 * 24 * 3600 * 1000;
  await changes.sweep();
  expect(s3.parts.has(givenUp)).toBe(false);
  expect(await changes.apply([upload])).toMatchObject([{ size: content.length }]);
});

test("an upload under a condition whose completion was not heard of is found to be there", async () => {
  const { s3, changes } = setUp();
  const content = Buffer.alloc(9 * MIB, "x");
  const conflict = Object.assign(new S3Error("PreconditionFailed", 412, "it is there"), { isRetried: true });
  const complete = s3.completeUpload.bind(s3);
  s3.completeUpload = async (...args) => {
    await complete(...args);
    throw conflict;
  };
  const put = (path: string) => send(changes, putOf(path, { noClobber: true }), content);
  expect(await changes.apply([await put("f")])).toMatchObject([{ size: content.length }]);
  s3.completeUpload = async (key) => {
    s3.set(key, "somebody else's");
    throw conflict;
  };
  expect(await changes.apply([await put("g")])).toMatchObject([{ code: "exists" }]);
});

test("a range that an engine gives of another version than it was asked for is not taken", async () => {
  await using server = Bun.serve({
    port: 0,
    fetch: () => new Response("content", { status: 206, headers: { etag: '"new"' } }),
  });
  const s3 = new S3({ bucket: "b", region: "r", endpoint: server.url.origin, accessKeyId: "x", secretAccessKey: "x" });
  expect(Buffer.from(await s3.read("f", "new", 0, 7)).toString()).toBe("content");
  expect(await s3.read("f", "old", 0, 7).catch(({ code }) => code)).toBe("PreconditionFailed");
});

test("whose token is for one folder is told to wait while the storage does not answer, and not denied", async () => {
  const page = "<ListBucketResult><Contents><Key>one/</Key><Size>0</Size></Contents></ListBucketResult>";
  let isThere = true;
  await using storage = Bun.serve({
    port: 0,
    fetch: ({ method }) => new Response(page, { status: !isThere ? 503 : method === "HEAD" ? 404 : 200 }),
  });
  using folder = temporaryFolder();
  const tokens = join(folder.path, "tokens");
  const token = addToken(tokens, { name: "one", access: "read", folder: "one" });
  const env = { AWS_ENDPOINT_URL: storage.url.origin, AWS_ACCESS_KEY_ID: "x", AWS_SECRET_ACCESS_KEY: "x" };
  await using server = await startServer("s3://bucket", { args: ["--tokens", tokens], env });
  const ask = async () => {
    using talk = await Talk.to(server.port, token);
    return await codeOf(talk.peer.ask({ action: "quit" }).then(() => talk.peer.expect("end")));
  };
  isThere = false;
  expect(await ask()).toBe("busy");
});

test("an upload has the etag that S3 says, also where that is no checksum of its parts", async () => {
  const { s3, changes } = setUp();
  s3.isEncrypted = true;
  const upload = await send(changes, putOf("f"), Buffer.alloc(9 * MIB, "x"));
  expect(await changes.apply([upload])).toMatchObject([{ etag: "opaque-2" }]);
});
