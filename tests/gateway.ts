/**
 * A gateway of S3 in memory, as much of it as a root needs, for what a real one does at no time that a test could choose:
 * whatever `interfere` answers is answered in its place. Signatures are not looked at.
 */
interface Held {
  content: Uint8Array;
  etag: string;
  mtime: string | null;
  modified: Date;
}

interface Pending {
  key: string;
  mtime: string | null;
  parts: Map<number, Uint8Array>;
}

/** What comes, as a test tells one request from another. */
export interface Asked {
  method: string;
  /** "" for the bucket. */
  key: string;
  query: URLSearchParams;
  headers: Headers;
}

type Interference = (asked: Asked) => Response | undefined | Promise<Response | undefined>;

const md5 = (content: Uint8Array) => new Bun.CryptoHasher("md5").update(content).digest("hex");
const escaped = (text: string) => text.replace(/[<>&]/g, (sign) => `&#${sign.charCodeAt(0)};`);
const xml = (name: string, content: string) =>
  new Response(
    `<?xml version="1.0" encoding="UTF-8"?><${name} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">${content}</${name}>`,
  );

export function failure(status: number, code: string, message = "", headers: Record<string, string> = {}): Response {
  const text = `<Error><Code>${code}</Code><Message>${escaped(message)}</Message></Error>`;
  return new Response(text, { status, headers });
}

export class Gateway implements Disposable {
  readonly objects = new Map<string, Held>();
  readonly uploads = new Map<string, Pending>();
  readonly asked: Asked[] = [];
  interfere: Interference = () => undefined;
  /** If-None-Match of a copy, as AWS has it and Ceph has not. */
  honoursCopies = true;
  #begun = 0;
  readonly #server = Bun.serve({
    hostname: "127.0.0.1",
    port: 0,
    idleTimeout: 0,
    fetch: (request) => this.#answer(request),
  });

  get endpoint(): string {
    return `http://127.0.0.1:${this.#server.port}`;
  }

  get env(): Record<string, string> {
    return {
      AWS_ENDPOINT_URL: this.endpoint,
      AWS_ACCESS_KEY_ID: "THE-KEY-ID",
      AWS_SECRET_ACCESS_KEY: "THE-SECRET",
      AWS_SESSION_TOKEN: "THE-TOKEN",
      AWS_REGION: "here",
    };
  }

  get keys(): string[] {
    return [...this.objects.keys()].sort();
  }

  set(key: string, content: Uint8Array | string, mtime: string | null = null): string {
    const bytes = Buffer.from(content);
    this.objects.set(key, { content: bytes, etag: md5(bytes), mtime, modified: new Date() });
    return md5(bytes);
  }

  [Symbol.dispose](): void {
    this.#server.stop(true);
  }

  async #answer(request: Request): Promise<Response> {
    const { pathname, searchParams: query } = new URL(request.url);
    const key = decodeURIComponent(pathname.split("/").slice(2).join("/"));
    const asked = { method: request.method, key, query, headers: request.headers };
    this.asked.push(asked);
    const body = await request.bytes();
    return (await this.interfere(asked)) ?? this.#ofBucket(asked, body) ?? this.#ofKey(asked, body);
  }

  #ofBucket({ method, key, query }: Asked, body: Uint8Array): Response | undefined {
    if (key !== "") return undefined;
    if (query.has("delete")) {
      for (const [, name] of new TextDecoder().decode(body).matchAll(/<Key>(.*?)<\/Key>/gs))
        this.objects.delete(name!.replace(/&#(\d+);/g, (_, code) => String.fromCodePoint(Number(code))));
      return xml("DeleteResult", "");
    }
    if (query.has("uploads")) return this.#listUploads();
    return method === "GET" ? this.#list(query) : undefined;
  }

  #list(query: URLSearchParams): Response {
    const [prefix = "", delimiter, token = ""] = ["prefix", "delimiter", "continuation-token"].map(
      (name) => query.get(name) ?? undefined,
    );
    const after = [token, query.get("start-after") ?? ""].sort().pop()!;
    const most = Number(query.get("max-keys") ?? 1000);
    const groups = new Map<string, string>();
    const entries: string[] = [];
    let last = "";
    let isCut = false;
    for (const key of this.keys.filter(
      (key) =>
        key.startsWith(prefix) && key > after && !(delimiter && token.endsWith(delimiter) && key.startsWith(token)),
    )) {
      const end = delimiter === undefined ? -1 : key.indexOf(delimiter, prefix.length);
      const group = end < 0 ? undefined : key.slice(0, end + 1);
      if (group !== undefined && groups.has(group)) continue;
      if (entries.length + groups.size === most) {
        isCut = true;
        break;
      }
      last = group ?? key;
      if (group !== undefined)
        groups.set(group, `<CommonPrefixes><Prefix>${encodeURIComponent(group)}</Prefix></CommonPrefixes>`);
      else entries.push(this.#entryOf(key));
    }
    const next = isCut ? `<NextContinuationToken>${escaped(last)}</NextContinuationToken>` : "";
    const facts = `<EncodingType>url</EncodingType><IsTruncated>${isCut}</IsTruncated>${next}`;
    return xml("ListBucketResult", facts + entries.join("") + [...groups.values()].join(""));
  }

  #entryOf(key: string): string {
    const { content, etag, modified } = this.objects.get(key)!;
    const facts = `<LastModified>${modified.toISOString()}</LastModified><ETag>&quot;${etag}&quot;</ETag><Size>${content.length}</Size>`;
    return `<Contents><Key>${encodeURIComponent(key)}</Key>${facts}</Contents>`;
  }

  #listUploads(): Response {
    const each = [...this.uploads].map(
      ([id, { key }]) =>
        `<Upload><Key>${escaped(key)}</Key><UploadId>${id}</UploadId><Initiated>${new Date().toISOString()}</Initiated></Upload>`,
    );
    return xml("ListMultipartUploadsResult", `<IsTruncated>false</IsTruncated>${each.join("")}`);
  }

  #ofKey(asked: Asked, body: Uint8Array): Response {
    const { method, key, query } = asked;
    if (query.has("uploads") || query.has("uploadId")) return this.#ofUpload(asked, body);
    if (method === "PUT") return this.#put(asked, body);
    const held = this.objects.get(key);
    if (method === "DELETE") {
      this.objects.delete(key);
      return new Response(null, { status: 204 });
    }
    return held ? read(asked, held) : failure(404, "NoSuchKey");
  }

  #put({ key, headers }: Asked, body: Uint8Array): Response {
    const source = headers.get("x-amz-copy-source");
    const isUnder = source === null || this.honoursCopies;
    const [none, match] = [headers.get("if-none-match"), headers.get("if-match")];
    const there = this.objects.get(key);
    if (isUnder && ((none === "*" && there) || (match !== null && there?.etag !== match)))
      return failure(412, "PreconditionFailed");
    if (source === null) {
      const etag = this.set(key, body, headers.get("x-amz-meta-mtime"));
      return new Response(null, { headers: { etag: `"${etag}"` } });
    }
    const from = this.objects.get(decodeURIComponent(source.split("/").slice(2).join("/")));
    if (!from) return failure(404, "NoSuchKey");
    if (from.etag !== headers.get("x-amz-copy-source-if-match")) return failure(412, "PreconditionFailed");
    this.objects.set(key, { ...from, modified: new Date() });
    return xml("CopyObjectResult", `<ETag>"${from.etag}"</ETag>`);
  }

  #ofUpload({ method, key, query, headers }: Asked, body: Uint8Array): Response {
    if (query.has("uploads")) {
      const id = `upload-${++this.#begun}`;
      this.uploads.set(id, { key, mtime: headers.get("x-amz-meta-mtime"), parts: new Map() });
      return xml("InitiateMultipartUploadResult", `<UploadId>${id}</UploadId>`);
    }
    const id = query.get("uploadId")!;
    const upload = this.uploads.get(id);
    if (!upload) return failure(404, "NoSuchUpload");
    if (method === "PUT") {
      upload.parts.set(Number(query.get("partNumber")), body);
      return new Response(null, { headers: { etag: `"${md5(body)}"` } });
    }
    this.uploads.delete(id);
    if (method === "DELETE") return new Response(null, { status: 204 });
    const parts = [...upload.parts].sort(([a], [b]) => a - b).map(([, part]) => part);
    const etag = `${md5(Buffer.concat(parts.map((part) => Buffer.from(md5(part), "hex"))))}-${parts.length}`;
    this.objects.set(key, { content: Buffer.concat(parts), etag, mtime: upload.mtime, modified: new Date() });
    return xml("CompleteMultipartUploadResult", `<ETag>"${etag}"</ETag>`);
  }
}

function read({ method, headers }: Asked, { content, etag, mtime, modified }: Held): Response {
  const match = headers.get("if-match");
  if (match !== null && match !== etag) return failure(412, "PreconditionFailed");
  const facts = {
    etag: `"${etag}"`,
    "last-modified": modified.toUTCString(),
    ...(mtime !== null && { "x-amz-meta-mtime": mtime }),
  };
  if (method === "HEAD") return new Response(null, { headers: { ...facts, "content-length": String(content.length) } });
  const [, from, to] = /^bytes=(\d+)-(\d+)$/.exec(headers.get("range") ?? "") ?? [];
  if (from === undefined) return new Response(content as Uint8Array<ArrayBuffer>, { headers: facts });
  const part = content.slice(Number(from), Number(to) + 1) as Uint8Array<ArrayBuffer>;
  return new Response(part, { status: 206, headers: facts });
}
