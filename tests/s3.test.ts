/** The client of S3 against gateways of the test's own: what real ones send too rarely, or never should. */

import { heapStats } from "bun:jsc";
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { S3 } from "../s3.ts";
import { TEST_MS } from "./fixtures.ts";

setDefaultTimeout(TEST_MS);

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
