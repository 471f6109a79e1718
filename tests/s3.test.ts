/** The client of S3 against gateways of the test's own: what real ones send too rarely, or never should. */

import { heapStats } from "bun:jsc";
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { S3, S3Error } from "../s3.ts";
import { randomBytes, startServer, TEST_MS, waitFor } from "./fixtures.ts";
import { type Asked, failure, Gateway } from "./gateway.ts";
import { codeOf, Talk } from "./talk.ts";

setDefaultTimeout(TEST_MS);

const MIB = 1024 * 1024;

/** What answers as `answer` does; and its client. */
function gatewayOf(answer: (request: Request) => Response | Promise<Response>) {
  const server = Bun.serve({ port: 0, hostname: "127.0.0.1", fetch: answer });
  const endpoint = `http://127.0.0.1:${server.port}`;
  return {
    endpoint,
    s3: new S3({ bucket: "tests", region: "r", endpoint, accessKeyId: "ID", secretAccessKey: "SECRET" }),
    [Symbol.dispose]: () => void server.stop(true),
  };
}

test("a request that is answered leaves nothing behind that waits for its time to be over", async () => {
  using gateway = gatewayOf(() => new Response(null, { headers: { etag: '"e"', "content-length": "0" } }));
  const signals = () => {
    Bun.gc(true);
    return heapStats().objectTypeCounts.AbortSignal ?? 0;
  };
  const stop = new AbortController();
  const limits = { signal: stop.signal };
  await gateway.s3.head("a", limits);
  const before = signals();
  for (let round = 0; round < 50; round++)
    await Promise.all(Array.from({ length: 20 }, (_, at) => gateway.s3.head("a", at % 2 ? limits : undefined)));
  expect(signals() - before).toBeLessThan(100);
});

test("a request ends when its time is over, and when it is wanted no more", async () => {
  using gateway = gatewayOf(() => new Promise(() => {}));
  const late = await gateway.s3.head("a", { withinMs: 50 }).catch((error) => error);
  expect([late.code, late.message]).toEqual(["Unreachable", `${gateway.endpoint} does not answer: no answer in time`]);
  const stop = new AbortController();
  const stopped = gateway.s3.head("a", { signal: stop.signal }).catch(({ code }) => code);
  stop.abort();
  expect(await stopped).toBe("Unreachable");
  expect(await gateway.s3.head("a", { signal: stop.signal }).catch(({ code }) => code)).toBe("Unreachable");
});

describe("list()", () => {
  const ODD = ["%41", "+", "a b", "a/é🎈", "&<>", "x\ty"];
  const xml = (text: string) => text.replace(/[&<>\t]/g, (sign) => `&#${sign.charCodeAt(0)};`);
  const page = (says: string, encode: (key: string) => string) =>
    `<ListBucketResult>${says}${ODD.map((key) => `<Contents><Key>${encode(key)}</Key><LastModified>2026-01-02T03:04:05Z</LastModified><ETag>"e"</ETag><Size>1</Size></Contents>`).join("")}<CommonPrefixes><Prefix>${encode("%42/")}</Prefix></CommonPrefixes></ListBucketResult>`;

  test.each([
    ["says that it encodes keys", page("<EncodingType>url</EncodingType>", encodeURIComponent)],
    ["does not, and does not say so", page("", xml)],
  ])("has the keys of a gateway that %s", async (_, body) => {
    using gateway = gatewayOf(() => new Response(body));
    const { objects, prefixes } = await gateway.s3.list("");
    expect(objects.map(({ key }) => key)).toEqual(ODD);
    expect(prefixes).toEqual(["%42/"]);
  });

  test("names nothing that is no UTF-8, encoded or not", async () => {
    const contents = (key: string) => `<Contents><Key>${key}</Key><Size>1</Size><ETag>"e"</ETag></Contents>`;
    const body = (says: string, key: string | Buffer) =>
      Buffer.concat(
        [
          `<ListBucketResult>${says}`,
          contents("\0").split("\0")[0]!,
          key,
          contents("\0").split("\0")[1]!,
          contents("b"),
          "</ListBucketResult>",
        ].map((part) => Buffer.from(part)),
      );
    for (const bytes of [body("<EncodingType>url</EncodingType>", "a%FF"), body("", Buffer.of(0x61, 0xff))]) {
      using gateway = gatewayOf(() => new Response(bytes));
      expect((await gateway.s3.list("")).objects.map(({ key }) => key)).toEqual([undefined, "b"]);
    }
  });
});

test("uploads() has their keys, from page to page, whatever is in them", async () => {
  const KEYS = ["%41+", "a b", "é&"];
  const asked: (string | null)[] = [];
  using gateway = gatewayOf(({ url }) => {
    const { searchParams } = new URL(url);
    asked.push(searchParams.get("key-marker"));
    // As Ceph does it: what it is asked to encode it encodes, but not where the next page begins.
    const encode = (key: string) =>
      searchParams.has("encoding-type") ? encodeURIComponent(key) : key.replace("&", "&amp;");
    const at = asked.length - 1;
    const key = KEYS[at]!;
    const upload = `<Upload><Key>${encode(key)}</Key><UploadId>${at}</UploadId><Initiated>2026-01-02T03:04:05Z</Initiated></Upload>`;
    const next = `<NextKeyMarker>${key.replace("&", "&amp;")}</NextKeyMarker><NextUploadIdMarker>${at}</NextUploadIdMarker>`;
    const isCut = at < KEYS.length - 1;
    return new Response(
      `<ListMultipartUploadsResult>${next}<IsTruncated>${isCut}</IsTruncated>${upload}</ListMultipartUploadsResult>`,
    );
  });
  const found = await Array.fromAsync(gateway.s3.uploads(""));
  expect(found.map(({ key }) => key)).toEqual(KEYS);
  expect(asked).toEqual([null, "%41+", "a b"]);
});

// ---------------------------------------------------------------------------------------------------- junk

const xmlOf = (name: string, content = "") => `<${name}>${content}</${name}>`;
/** A body that has no end. */
const endless = () => new ReadableStream({ pull: (controller) => controller.enqueue(new Uint8Array(MIB)) });
const WITH = { headers: { etag: '"e"' } };
const entry = (content: string) => xmlOf("ListBucketResult", `${xmlOf("Contents", content)}`);

/** What is answered with a status of 200, and is no answer of S3. */
const JUNK: Record<string, () => Response> = {
  nothing: () => new Response(""),
  "a page": () => new Response("<!doctype html><html><body>Sign in</body></html>", WITH),
  JSON: () => new Response('{"error":"maintenance"}', WITH),
  bytes: () => new Response(randomBytes(5000) as Uint8Array<ArrayBuffer>, WITH),
  "an empty element": () => new Response("<Result/>", WITH),
  "an answer that is cut": () => new Response("<ListBucketResult><Contents><Key>a</Key>", WITH),
};

const LARGE: Record<string, () => Response> = {
  "something endless": () => new Response(endless(), WITH),
  "something large": () => new Response(new Uint8Array(40 * MIB), WITH),
  "many beginnings": () => new Response("<ListBucketResult>".repeat(500_000), WITH),
};

/** Answers of the right kind that lack something. */
const ALMOST: Record<string, [keyof typeof CALLS, () => Response][]> = {
  "no etag": [
    ["head", () => new Response(null, { headers: { "content-length": "5" } })],
    ["put", () => new Response("")],
    ["putPart", () => new Response("", { headers: { etag: '""' } })],
    ["readAll", () => new Response("x")],
    ["copyPart", () => new Response(xmlOf("CopyPartResult"))],
  ],
  "no key": [["list", () => new Response(entry("<Size>1</Size><ETag>e</ETag>"))]],
  "no size": [["list", () => new Response(entry("<Key>prefix/a</Key><ETag>e</ETag>"))]],
  "a size that is none": [["list", () => new Response(entry("<Key>prefix/a</Key><Size>-1</Size><ETag>e</ETag>"))]],
  "a size beyond all": [["list", () => new Response(entry(`<Key>prefix/a</Key><Size>${"9".repeat(30)}</Size>`))]],
  "another's key": [["list", () => new Response(entry("<Key>other/a</Key><Size>1</Size><ETag>e</ETag>"))]],
  "another's folder": [
    ["list", () => new Response(xmlOf("ListBucketResult", "<CommonPrefixes><Prefix>b/</Prefix></CommonPrefixes>"))],
  ],
  "no end said": [
    ["list", () => new Response(xmlOf("ListBucketResult", "<IsTruncated>perhaps</IsTruncated>"))],
    ["list", () => new Response(xmlOf("ListBucketResult", "<IsTruncated>true</IsTruncated>"))],
    ["list", () => new Response(xmlOf("ListBucketResult", "<NextContinuationToken>t</NextContinuationToken>"))],
    ["uploads", () => new Response(xmlOf("ListMultipartUploadsResult", "<IsTruncated>true</IsTruncated>"))],
  ],
  "the same again": [
    [
      "list",
      () =>
        new Response(
          xmlOf("ListBucketResult", "<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>"),
        ),
    ],
    [
      "uploads",
      () =>
        new Response(
          xmlOf("ListMultipartUploadsResult", "<IsTruncated>true</IsTruncated><NextKeyMarker>k</NextKeyMarker>"),
        ),
    ],
  ],
  "no id": [
    ["createUpload", () => new Response(xmlOf("InitiateMultipartUploadResult"))],
    ["uploads", () => new Response(xmlOf("ListMultipartUploadsResult", "<Upload><Key>prefix/a</Key></Upload>"))],
  ],
  "other bytes": [
    ["read", () => new Response("four", WITH)],
    ["read", () => new Response(new Uint8Array(100 * MIB), { status: 206, ...WITH })],
  ],
};

const CALLS = {
  head: (s3: S3) => s3.head("prefix/a"),
  read: (s3: S3) => s3.read("prefix/a", "e", 0, 5),
  readAll: (s3: S3) => s3.readAll("prefix/a"),
  put: (s3: S3) => s3.put("prefix/a", "content"),
  list: (s3: S3) => s3.list("prefix/", { token: "t" }),
  removeAll: (s3: S3) => s3.removeAll(["prefix/a"]),
  copy: (s3: S3) => s3.copy("prefix/a", "e", "prefix/b"),
  createUpload: (s3: S3) => s3.createUpload("prefix/a", "1"),
  putPart: (s3: S3) => s3.putPart("prefix/a", "id", 1, new Uint8Array(5), "0".repeat(64)),
  copyPart: (s3: S3) => s3.copyPart("prefix/a", "id", 1, "prefix/b", "e", 0, 5),
  completeUpload: (s3: S3) => s3.completeUpload("prefix/a", "id", [{ number: 1, etag: "e" }]),
  uploads: (s3: S3) => Array.fromAsync(s3.uploads("prefix/")),
};

/** These look at headers alone, whatever comes with them. */
const HAVE_ETAG = new Set(["head", "put", "putPart", "readAll"]);

async function expectBad(call: keyof typeof CALLS, answer: () => Response): Promise<void> {
  using gateway = gatewayOf(answer);
  const error = await CALLS[call](gateway.s3).then(
    () => "no error",
    (error) => error,
  );
  expect(error).toBeInstanceOf(S3Error);
  expect([call, error.isPassing, error.message.includes(gateway.endpoint)]).toEqual([call, true, true]);
}

describe("an answer that is none is an error that may pass, and says who gave it", () => {
  test.each(Object.entries(JUNK))("%s", async (_, answer) => {
    const hasEtag = answer().headers.has("etag");
    const calls = (Object.keys(CALLS) as (keyof typeof CALLS)[]).filter((call) => !hasEtag || !HAVE_ETAG.has(call));
    await Promise.all(calls.map((call) => expectBad(call, answer)));
  });

  test.each(Object.entries(LARGE))("%s", async (_, answer) => {
    await Promise.all((["list", "uploads", "read", "createUpload"] as const).map((call) => expectBad(call, answer)));
  });

  test.each(Object.entries(ALMOST))("%s", async (_, each) => {
    await Promise.all(each.map(([call, answer]) => expectBad(call, answer)));
  });

  test("of what has no end, little is taken", async () => {
    using gateway = gatewayOf(() => new Response(endless(), WITH));
    const before = process.memoryUsage().rss;
    expect(await gateway.s3.readAll("a").catch(({ code }) => code)).toBe("BadAnswer");
    expect(process.memoryUsage().rss - before).toBeLessThan(400 * MIB);
  });
});

describe("a server whose gateway talks nonsense", () => {
  test("says `busy`, loses nothing, ends no process, and is well again when the gateway is", async () => {
    using gateway = new Gateway();
    const all = ["a", "d/b", "d/c", "d/e/f"];
    for (const key of all) gateway.set(key, `content of ${key}`, "1.5");
    await using server = await startServer("s3://tests", { args: ["--writable"], env: gateway.env });
    const workers = server.workers().sort();
    const asks: [string, (talk: Talk) => Promise<unknown>][] = [
      ["stat", (talk) => talk.stat("a")],
      ["get", (talk) => talk.get("a")],
      ["list", (talk) => talk.list()],
      ["put", (talk) => talk.put("new", "content", { noClobber: true })],
      ["put whole", (talk) => talk.put("new", "content", { whole: true })],
      ["large put", (talk) => talk.put("large", randomBytes(9 * MIB), { id: "0".repeat(32) })],
      ["sums", (talk) => talk.peer.sums("0".repeat(32), "")],
      ["remove", (talk) => talk.remove("a")],
      ["remove folder", (talk) => talk.remove("d", true)],
      ["move", (talk) => talk.move("a", "moved")],
      ["move folder", (talk) => talk.move("d", "moved")],
      ["mkdir", (talk) => talk.mkdir("folder")],
    ];
    const ask = async (what: (talk: Talk) => Promise<unknown>) => {
      using talk = await Talk.to(server.port);
      return await codeOf(what(talk));
    };
    for (const name of ["nothing", "a page", "an answer that is cut"]) {
      const answer = JUNK[name]!;
      gateway.interfere = () => {
        const response = answer();
        // With one, it could be an object.
        response.headers.delete("etag");
        return response;
      };
      const codes = await Promise.all(asks.map(async ([what, work]) => [name, what, await ask(work)]));
      expect(codes).toEqual(asks.map(([what]) => [name, what, "busy"]));
      using talk = await Talk.to(server.port);
      expect((await talk.status()).problem).toContain(gateway.endpoint);
    }
    gateway.interfere = () => undefined;
    expect(gateway.keys.filter((key) => !key.startsWith(".reprise/"))).toEqual(all);
    for (const key of all) {
      using talk = await Talk.to(server.port);
      expect((await talk.get(key)).content.toString()).toBe(`content of ${key}`);
    }
    // Answers to what changes something are junk, one kind at a time, and all else is well.
    for (const isIt of [isCopy, isMultiDelete]) {
      gateway.interfere = (asked) => (isIt(asked) ? JUNK["a page"]!() : undefined);
      expect([await ask((talk) => talk.move("d", "moved")), gateway.objects.has("d/b")]).toEqual(["busy", true]);
      gateway.interfere = () => undefined;
      using talk = await Talk.to(server.port);
      if (gateway.objects.has("moved/b")) await talk.remove("moved", true);
    }
    expect(server.workers().sort()).toEqual(workers);
    expect(server.log.filter(({ event }) => event === "bug")).toEqual([]);
  });
});

const isCopy = ({ headers }: Asked) => headers.has("x-amz-copy-source");
const isMultiDelete = ({ query }: Asked) => query.has("delete");

test("what S3 says is wrong is in the log, with the request's id, and no secret", async () => {
  using gateway = new Gateway();
  gateway.set("f", "content");
  await using server = await startServer("s3://tests", { args: ["--writable", "--workers", "1"], env: gateway.env });
  using talk = await Talk.to(server.port);
  const cases: [number, string, string, string, () => Promise<unknown>][] = [
    [400, "InvalidArgument", "PUT", "failed", () => talk.put("p", "content")],
    [403, "AccessDenied", "PUT", "refused", () => talk.put("q", "content", { whole: true })],
    [400, "EntityTooLarge", "PUT", "too_large", () => talk.put("r", "content")],
    [403, "SignatureDoesNotMatch", "DELETE", "failed", () => talk.remove("f")],
    [418, "", "GET", "failed", () => talk.get("f")],
  ];
  let sent = "";
  for (const [status, code, method, answer, work] of cases) {
    gateway.interfere = (asked) => {
      if (asked.method !== method || (method === "GET" && asked.key === "") || asked.key.includes(".reprise")) return;
      sent = [...asked.headers.values(), "THE-SECRET"].join("\n");
      return failure(status, code, `we do not like\n${sent}`, { "x-amz-request-id": `request-${status}-${code}` });
    };
    expect(await codeOf(work())).toBe(answer);
    const line = await waitFor("it is in the log", () =>
      server.log.find(({ event, why }) => event === "storage" && why?.includes(`request-${status}-${code})`)),
    );
    expect(line.status).toBe(answer);
    expect(line.path).toMatch(/^[pqrf]$/);
    expect(line.why).toContain(`${method} "${line.path}": ${code || `Status${status}`}: we do not like`);
    expect(line.why).toContain(`status ${status}`);
  }
  const signature = /Signature=([0-9a-f]{64})/.exec(sent)![1]!;
  for (const secret of ["THE-SECRET", "THE-TOKEN", signature]) expect(server.stderr()).not.toContain(secret);
});

describe("a bucket that takes no files", () => {
  const isPut = ({ method, headers }: Asked) => method === "PUT" && !headers.has("x-amz-copy-source");

  async function start(gateway: Gateway, args: string[] = []) {
    gateway.set("there", "content");
    const server = await startServer("s3://tests", { args: ["--writable", ...args], env: gateway.env });
    const ask = async <T>(work: (talk: Talk) => Promise<T>) => {
      using talk = await Talk.to(server.port);
      return await work(talk);
    };
    return {
      server,
      put: (path: string, content = "content") => ask((talk) => codeOf(talk.put(path, content))),
      get: async () => (await ask((talk) => talk.get("there"))).content.toString(),
      problem: async () => (await ask((talk) => talk.status())).problem as string | undefined,
      [Symbol.asyncDispose]: () => server[Symbol.asyncDispose](),
    };
  }

  /** Of one worker and the other: so many connections meet both. */
  const several = <T>(work: () => Promise<T>) => Promise.all(Array.from({ length: 24 }, work));

  test.each([
    ["a quota", 403, "QuotaExceeded"],
    ["a full disk", 507, "XMinioStorageFull"],
    ["a full disk, in no words", 507, ""],
  ])("for %s: is `no_room`, and in the status of all workers", async (_, status, code) => {
    using gateway = new Gateway();
    await using it = await start(gateway);
    expect(await several(it.problem)).toEqual(Array(24).fill(undefined));
    expect(gateway.asked.filter((asked) => isPut(asked) && asked.key.includes("try-"))).toHaveLength(1);
    gateway.interfere = (asked) => (isPut(asked) ? failure(status, code) : undefined);
    expect(await it.put("f")).toBe("no_room");
    await waitFor("both say so", async () => (await several(it.problem)).every((text) => text?.includes("no room")));
    expect(await it.get()).toBe("content");
    expect(await it.put("g", randomBytes(9 * MIB).toString())).toBe("no_room");
    gateway.interfere = () => undefined;
    // There may be room for a little that is tried, and not for what was refused.
    expect(await it.problem()).toContain("no room");
    expect(await it.put("f")).toBe("ok");
    await waitFor("none says so any more", async () => (await several(it.problem)).every((text) => text === undefined));
    expect(gateway.keys.filter((key) => !key.includes("/try-"))).toEqual(["f", "there"]);
  });

  test("for now: is `busy`, and in the status until it takes some", async () => {
    using gateway = new Gateway();
    await using it = await start(gateway);
    gateway.interfere = (asked) => (isPut(asked) ? failure(503, "ServiceUnavailable") : undefined);
    expect(await it.put("f")).toBe("busy");
    await waitFor("both say so", async () => (await several(it.problem)).every((text) => text?.includes("no files")));
    expect(await it.get()).toBe("content");
    gateway.interfere = () => undefined;
    // Nobody has to put anything for that.
    await waitFor("none says so any more", async () => (await several(it.problem)).every((text) => text === undefined));
  });

  test("is served all the same when the server is started", async () => {
    using gateway = new Gateway();
    gateway.interfere = (asked) => (isPut(asked) ? failure(507, "") : undefined);
    await using it = await start(gateway);
    expect(await it.get()).toBe("content");
    expect(await it.put("f")).toBe("no_room");
  });
});
