/**
 * A client of S3, as far as a root on it needs one: AWS itself, Ceph's gateway, MinIO, R2 and others that speak it.
 *
 * Requests go over `fetch`, signed here (AWS Signature Version 4), because Bun's own S3 client sends no conditional
 * headers: `If-Match` is what makes a download one version, `If-None-Match` what keeps two uploads from one name. What
 * S3 sends back is asked for in pieces, since `fetch` takes a body whole, however slowly its reader reads. Large
 * pieces come past it where there is no TLS: see httpget.ts.
 *
 * What may pass by itself is tried again: no connection, no answer in time, a status of 5xx, SlowDown. All tries of a
 * request together have a limit. What then is thrown is an `S3Error` whose `code` is S3's own, or `Unreachable`.
 */
import { HttpGetter } from "./httpget.ts";
import { quote } from "./protocol.ts";
import {
  badAnswer,
  checkXml,
  errorOfXml,
  etagIn,
  fieldOf,
  infoOf,
  isBadAnswer,
  type ObjectInfo,
  pageOf,
  S3Error,
  type UploadPage,
  unescapeXml,
  unquote,
  uploadsOf,
} from "./s3answers.ts";

export { type ListedObject, type ListPage, type ObjectInfo, S3Error } from "./s3answers.ts";

/** Tries of one request, the waits between them, and how long one takes before it is given up. */
const MAX_TRIES = 5;
const FIRST_WAIT_MS = 100;
const TRY_MS = 8_000;
/** And so much longer for each MiB that goes along, to or fro. */
const MIB_MS = 1_000;
/** What copies or puts together, without a byte of ours, may take so much longer. */
const LONG_MS = 300_000;
/** What S3 takes to remove at once, and to list. */
const MAX_KEYS = 1000;
/** An answer is a page of a list at the most: 1,000 keys of 1,024 bytes, encoded; but for content, of which it is known. */
const MAX_ANSWER_BYTES = 16 * 1024 * 1024;
const MIB = 1024 * 1024;
/** From here on, an answer's content is received past `fetch`. Of smaller ones there may be hundreds under way. */
const MIN_DIRECT_BYTES = MIB;
/** Characters of a request's id that are shown. */
const MAX_ID = 100;
export interface S3Settings {
  bucket: string;
  region: string;
  /** Where not at AWS: then the bucket is a part of the path. */
  endpoint?: string | undefined;
  accessKeyId: string;
  secretAccessKey: string;
  sessionToken?: string | undefined;
}

export interface ListOptions {
  delimiter?: string;
  /** `next` of the page before. */
  token?: string | undefined;
  startAfter?: string;
  max?: number;
}

/** Under which an object is written: "*" for none with that name, else the etag of the one that there must be. */
export interface PutConditions {
  ifNoneMatch?: "*" | undefined;
  ifMatch?: string | undefined;
}

export interface Part {
  number: number;
  etag: string;
}

export interface RequestLimits {
  signal?: AbortSignal | undefined;
  /** All tries together; what is usual if not given. */
  withinMs?: number;
}

interface Call {
  method: "GET" | "HEAD" | "PUT" | "POST" | "DELETE";
  /** "" for the bucket itself. */
  key: string;
  query?: Record<string, string | undefined>;
  headers?: Record<string, string | undefined>;
  body?: Uint8Array | string | undefined;
  /** The body's, in hexadecimal, where it is known. */
  sha256?: string | undefined;
  /** Bytes that are expected back; and as many may come at most. */
  answerBytes?: number;
  mostBytes?: number;
  /** Where these are to be put, if that can be. */
  place?: Uint8Array | undefined;
  /** It may go on for long before there is an answer. */
  isLong?: boolean;
  limits?: RequestLimits | undefined;
}

const NOTHING = new Uint8Array(0);
const nothing = () => {};

interface Answer {
  headers: Headers;
  body: Uint8Array;
}

export class S3 {
  readonly settings: S3Settings;
  readonly #base: URL;
  readonly #pathPrefix: string;
  readonly #getter: HttpGetter | undefined;
  #signingKey: { day: string; key: Buffer } | undefined;

  constructor(settings: S3Settings) {
    this.settings = settings;
    const { endpoint, bucket, region } = settings;
    // A certificate for *.s3.… does not stand for a name with further dots.
    const isPath = endpoint !== undefined || bucket.includes(".");
    const host = isPath ? `s3.${region}.amazonaws.com` : `${bucket}.s3.${region}.amazonaws.com`;
    this.#base = new URL(endpoint ?? `https://${host}`);
    this.#getter = HttpGetter.for(this.#base);
    this.#pathPrefix = this.#base.pathname.replace(/\/+$/, "") + (isPath ? `/${encodeKey(bucket)}` : "");
  }

  /** Where it is, for messages to who runs the server. */
  get address(): string {
    return this.#base.origin;
  }

  /** Undefined where there is no such object. */
  async head(key: string, limits?: RequestLimits): Promise<ObjectInfo | undefined> {
    try {
      return await this.#call({ method: "HEAD", key, limits }, ({ headers }) => infoOf(headers));
    } catch (error) {
      if (error instanceof S3Error && error.status === 404 && error.code !== "NoSuchBucket") return undefined;
      throw error;
    }
  }

  /**
   * These bytes of that version, which may be put into `spare`, if that is of their length. Throws `PreconditionFailed`
   * where it is another by now.
   */
  async read(
    key: string,
    etag: string,
    offset: number,
    length: number,
    limits?: RequestLimits,
    spare?: Uint8Array,
  ): Promise<Uint8Array> {
    const headers = { range: `bytes=${offset}-${offset + length - 1}`, "if-match": etag };
    const place = this.#placeFor(length, spare);
    const call: Call = { method: "GET", key, headers, answerBytes: length, mostBytes: length, place, limits };
    return this.#call(call, ({ headers: said, body }) => {
      // Not every engine looks at the condition.
      const found = said.get("etag");
      if (found !== null && unquote(found) !== etag)
        throw new S3Error("PreconditionFailed", 412, `${quote(key)} is another version by now`);
      if (body.length !== length)
        throw new S3Error("IncompleteBody", 206, `${body.length} bytes came of ${quote(key)}, and not ${length}`);
      return body;
    });
  }

  /** Undefined where `fetch` finds one. */
  #placeFor(length: number, spare: Uint8Array | undefined): Uint8Array | undefined {
    if (!this.#getter || length < MIN_DIRECT_BYTES) return undefined;
    return spare?.length === length ? spare : new Uint8Array(Buffer.allocUnsafeSlow(length).buffer);
  }

  /** All of a small object; undefined where there is none. */
  async readAll(key: string): Promise<{ etag: string; body: Uint8Array } | undefined> {
    try {
      const call: Call = { method: "GET", key, answerBytes: MIB };
      return await this.#call(call, ({ headers, body }) => ({ etag: etagIn(headers.get("etag")), body }));
    } catch (error) {
      if (error instanceof S3Error && error.code === "NoSuchKey") return undefined;
      throw error;
    }
  }

  /** Returns the etag. */
  async put(
    key: string,
    body: Uint8Array | string,
    { mtime, ifNoneMatch, ifMatch }: { mtime?: string | undefined } & PutConditions = {},
    limits?: RequestLimits,
  ): Promise<string> {
    const conditions = { "if-none-match": ifNoneMatch, "if-match": ifMatch };
    const headers = { ...conditions, "x-amz-meta-mtime": mtime };
    return this.#call({ method: "PUT", key, headers, body, limits }, ({ headers }) => etagIn(headers.get("etag")));
  }

  async list(prefix: string, { delimiter, token, startAfter, max }: ListOptions = {}, limits?: RequestLimits) {
    const query = {
      "list-type": "2",
      "encoding-type": "url",
      prefix,
      delimiter,
      "continuation-token": token,
      "start-after": startAfter,
      "max-keys": max === undefined ? undefined : String(Math.min(max, MAX_KEYS)),
    };
    return this.#xml({ method: "GET", key: "", query, limits }, (xml) => pageOf(xml, { prefix, token }));
  }

  async remove(key: string): Promise<void> {
    await this.#call({ method: "DELETE", key }, nothing);
  }

  /** Any number of them. */
  async removeAll(keys: string[]): Promise<void> {
    for (let at = 0; at < keys.length; at += MAX_KEYS) await this.#removeSome(keys.slice(at, at + MAX_KEYS));
  }

  async #removeSome(keys: string[]): Promise<void> {
    // What XML has no place for goes by itself.
    const [plain, odd] = [keys.filter(isXmlText), keys.filter((key) => !isXmlText(key))];
    for (const key of odd) await this.remove(key);
    if (plain.length === 0) return;
    const objects = plain.map((key) => `<Object><Key>${escapeXml(key)}</Key></Object>`).join("");
    const body = `<Delete><Quiet>true</Quiet>${objects}</Delete>`;
    const headers = { "content-md5": new Bun.CryptoHasher("md5").update(body).digest("base64") };
    await this.#xml({ method: "POST", key: "", query: { delete: "" }, headers, body }, (xml) => {
      checkXml(xml, "DeleteResult");
      const failure = fieldOf(xml, "Error");
      if (failure !== undefined) throw errorOfXml(200, failure, "removing");
    });
  }

  /**
   * Throws `PreconditionFailed` where the source is no longer that version, or something is there already: as far as the
   * gateway looks at such conditions of a copy; AWS does, and Ceph looks at neither.
   */
  async copy(from: string, etag: string, to: string, { ifNoneMatch }: PutConditions = {}): Promise<void> {
    const headers = {
      "if-none-match": ifNoneMatch,
      "x-amz-copy-source": `/${encodeKey(this.settings.bucket)}/${encodeKey(from)}`,
      "x-amz-copy-source-if-match": etag,
    };
    // The original is removed on the strength of this.
    await this.#xml({ method: "PUT", key: to, headers, isLong: true }, (xml) => checkXml(xml, "CopyObjectResult"));
  }

  // ------------------------------------------------------------------------------------------------ multipart

  /** Returns the upload's id. */
  async createUpload(key: string, mtime: string): Promise<string> {
    const headers = { "x-amz-meta-mtime": mtime };
    return this.#xml({ method: "POST", key, query: { uploads: "" }, headers }, (xml) => {
      checkXml(xml, "InitiateMultipartUploadResult");
      const id = fieldOf(xml, "UploadId");
      if (!id) throw badAnswer("an upload without a name for it");
      return unescapeXml(id);
    });
  }

  /** Returns the part's etag. */
  async putPart(key: string, uploadId: string, number: number, body: Uint8Array, sha256: string): Promise<string> {
    const query = { partNumber: String(number), uploadId };
    return this.#call({ method: "PUT", key, query, body, sha256 }, ({ headers }) => etagIn(headers.get("etag")));
  }

  /** A part that is these bytes of another object's version. Returns its etag. */
  async copyPart(
    key: string,
    uploadId: string,
    number: number,
    from: string,
    etag: string,
    at: number,
    length: number,
  ) {
    const headers = {
      "x-amz-copy-source": `/${encodeKey(this.settings.bucket)}/${encodeKey(from)}`,
      "x-amz-copy-source-if-match": etag,
      "x-amz-copy-source-range": `bytes=${at}-${at + length - 1}`,
    };
    const query = { partNumber: String(number), uploadId };
    return this.#xml({ method: "PUT", key, query, headers, isLong: true }, (xml) => {
      checkXml(xml, "CopyPartResult");
      return etagIn(fieldOf(xml, "ETag"));
    });
  }

  /** Returns the etag of the object that there is now, "" where S3 does not say it. Throws `NoSuchUpload`, `InvalidPart`. */
  async completeUpload(key: string, uploadId: string, parts: Part[], { ifNoneMatch, ifMatch }: PutConditions = {}) {
    const list = parts.map(
      ({ number, etag }) => `<Part><PartNumber>${number}</PartNumber><ETag>"${etag}"</ETag></Part>`,
    );
    const body = `<CompleteMultipartUpload>${list.join("")}</CompleteMultipartUpload>`;
    const headers = { "if-none-match": ifNoneMatch, "if-match": ifMatch };
    return this.#xml({ method: "POST", key, query: { uploadId }, headers, body, isLong: true }, (xml) => {
      checkXml(xml, "CompleteMultipartUploadResult");
      return unquote(unescapeXml(fieldOf(xml, "ETag") ?? ""));
    });
  }

  /** Nothing to do where there is no such upload any more. */
  async abortUpload(key: string, uploadId: string): Promise<void> {
    try {
      await this.#call({ method: "DELETE", key, query: { uploadId } }, nothing);
    } catch (error) {
      if (!(error instanceof S3Error) || error.status !== 404) throw error;
    }
  }

  /**
   * Those that are not completed, page by page. Their keys come as XML has them: asked to encode them, Ceph does so without
   * saying it, and not in what the next page begins with.
   */
  async *uploads(prefix: string): AsyncGenerator<UploadPage["uploads"][number]> {
    for (let token: UploadPage["next"]; ; ) {
      const query = { uploads: "", prefix, "key-marker": token?.key, "upload-id-marker": token?.id };
      const page = await this.#xml({ method: "GET", key: "", query }, (xml) => uploadsOf(xml, prefix, token));
      yield* page.uploads;
      if (!page.next) return;
      token = page.next;
    }
  }

  // ------------------------------------------------------------------------------------------------ requests

  /** An answer that is XML. An error may come with a status of 200 where S3 took long. */
  #xml<T>(call: Call, read: (xml: string) => T): Promise<T> {
    return this.#call({ ...call, answerBytes: MIB }, ({ headers, body }) => {
      const text = new TextDecoder().decode(body);
      const error = /^(?:\s|<\?[^>]*>)*<Error>/.test(text) ? fieldOf(text, "Error") : undefined;
      if (error !== undefined) throw this.#refusal(500, error, call, headers);
      return read(text);
    });
  }

  /** What `read` makes of the answer. Tried again where it fails in a way that may pass, be it that the answer is none. */
  async #call<T>(call: Call, read: (answer: Answer) => T): Promise<T> {
    const bytes = (call.body?.length ?? 0) + (call.answerBytes ?? 0);
    const tryMs = TRY_MS + (bytes / MIB) * MIB_MS + (call.isLong ? LONG_MS : 0);
    const end = performance.now() + (call.limits?.withinMs ?? 2 * tryMs);
    for (let tries = 1; ; tries++) {
      const startedAt = performance.now();
      try {
        return read(await this.#try(call, Math.min(tryMs, end - startedAt)));
      } catch (caught) {
        const error = this.#named(caught, call);
        if (error instanceof S3Error) {
          error.isRetried = tries > 1;
          error.isWrite = call.method === "PUT" || (call.method === "POST" && call.key !== "");
        }
        const waitMs = FIRST_WAIT_MS * 2 ** (tries - 1) * (0.5 + Math.random());
        const isPassing = error instanceof S3Error && error.isPassing && !call.limits?.signal?.aborted;
        if (!isPassing || tries === MAX_TRIES || performance.now() + waitMs >= end) throw error;
        await Bun.sleep(waitMs);
      }
    }
  }

  /** An answer that is none: who gave it, and to what. */
  #named(error: unknown, call: Call): unknown {
    if (!isBadAnswer(error)) return error;
    const what = `${this.address} does not answer ${this.#nameOf(call)} as S3 does`;
    return new S3Error(error.code, error.status, `${what}: ${this.#tamed(error.message)}`, { cause: error });
  }

  async #try(call: Call, withinMs: number): Promise<Answer> {
    const { method, body, place, limits, mostBytes = MAX_ANSWER_BYTES } = call;
    const url = this.#urlOf(call);
    const { signal, done } = until(withinMs, limits?.signal);
    let response: Response;
    let content: Uint8Array;
    try {
      const signed = this.#signed(call, url);
      const direct = place && (await this.#getter?.get(url.slice(this.#base.origin.length), signed, place, signal));
      if (direct) return { headers: direct, body: place };
      const options = { method, headers: signed, body, signal, redirect: "manual", decompress: false };
      response = await fetch(url, options as RequestInit);
      content = method === "HEAD" ? NOTHING : await bodyOf(response, response.ok ? mostBytes : MIB);
    } catch (error) {
      if (error instanceof S3Error) throw error;
      throw new S3Error("Unreachable", 0, `${this.address} does not answer: ${reasonOf(error)}`, { cause: error });
    } finally {
      done();
    }
    if (response.ok) return { headers: response.headers, body: content };
    throw this.#refusal(
      response.status,
      new TextDecoder().decode(content.subarray(0, 64 * 1024)),
      call,
      response.headers,
    );
  }

  /** What S3 says in place of an answer. */
  #refusal(status: number, xml: string, call: Call, headers: Headers): S3Error {
    const requestId = headers.get("x-amz-request-id") ?? undefined;
    return errorOfXml(
      status,
      this.#tamed(xml),
      this.#nameOf(call),
      requestId && this.#tamed(requestId).slice(0, MAX_ID),
    );
  }

  #nameOf({ method, key }: Call): string {
    return `${method} ${key === "" ? this.settings.bucket : quote(key)}`;
  }

  /** A text of somebody else, who may repeat what was sent: it goes to the log, and there no secret, nor a signature. */
  #tamed(text: string): string {
    const { secretAccessKey, sessionToken } = this.settings;
    const secrets = [secretAccessKey, ...(sessionToken ? [sessionToken] : [])];
    const hidden = secrets.reduce((text, secret) => text.replaceAll(secret, "…"), text);
    return hidden.replace(/[0-9a-f]{64}/gi, "…").replace(/\p{Cc}+/gu, " ");
  }

  #urlOf({ key, query = {} }: Call): string {
    const path = `${this.#pathPrefix}/${encodeKey(key)}`;
    const text = canonicalQuery(query);
    return `${this.#base.origin}${path}${text === "" ? "" : `?${text}`}`;
  }

  /** The headers of a request, with its signature: see "Create a signed AWS API request" of AWS. */
  #signed({ method, headers: given = {}, body, sha256 }: Call, url: string): Record<string, string> {
    const { accessKeyId, sessionToken, region } = this.settings;
    const time = `${new Date().toISOString().replace(/[-:]|\.\d+/g, "")}`;
    const day = time.slice(0, 8);
    const headers: Record<string, string> = {
      host: this.#base.host,
      "x-amz-content-sha256": sha256 ?? hash(body ?? ""),
      "x-amz-date": time,
    };
    if (sessionToken) headers["x-amz-security-token"] = sessionToken;
    for (const [name, value] of Object.entries(given)) if (value !== undefined) headers[name] = value;
    const names = Object.keys(headers).sort();
    const [path, query = ""] = url.slice(this.#base.origin.length).split("?");
    const lines = names.map((name) => `${name}:${headers[name]}\n`).join("");
    const signedNames = names.join(";");
    const canonical = [method, path, query, lines, signedNames, headers["x-amz-content-sha256"]].join("\n");
    const scope = `${day}/${region}/s3/aws4_request`;
    const signature = hmac(this.#keyOf(day), `AWS4-HMAC-SHA256\n${time}\n${scope}\n${hash(canonical)}`).toString("hex");
    const credential = `Credential=${accessKeyId}/${scope}`;
    headers.authorization = `AWS4-HMAC-SHA256 ${credential}, SignedHeaders=${signedNames}, Signature=${signature}`;
    // Of what is an object as it is: nothing is to be packed on the way.
    headers["accept-encoding"] = "identity";
    return headers;
  }

  /** The same for a day. */
  #keyOf(day: string): Buffer {
    if (this.#signingKey?.day !== day) {
      const { secretAccessKey, region } = this.settings;
      const parts = [day, region, "s3", "aws4_request"];
      const key = parts.reduce<Buffer>((key, part) => hmac(key, part), Buffer.from(`AWS4${secretAccessKey}`));
      this.#signingKey = { day, key };
    }
    return this.#signingKey.key;
  }
}

/**
 * A signal that ends a request after that time, or when `other` does; to be let go of with `done`. A signal of
 * `AbortSignal.timeout` would stay for all of that time, however soon the answer comes: many thousands of them.
 */
function until(ms: number, other: AbortSignal | undefined): { signal: AbortSignal; done: () => void } {
  const controller = new AbortController();
  const timer = setTimeout(() => controller.abort(new DOMException("late", "TimeoutError")), Math.max(1, ms));
  const end = () => controller.abort(other!.reason);
  other?.addEventListener("abort", end, { once: true });
  if (other?.aborted) end();
  const done = () => {
    clearTimeout(timer);
    other?.removeEventListener("abort", end);
  };
  return { signal: controller.signal, done };
}

function hash(content: Uint8Array | string): string {
  return new Bun.CryptoHasher("sha256").update(content).digest("hex");
}

function hmac(key: Buffer, text: string): Buffer {
  return new Bun.CryptoHasher("sha256", key).update(text).digest() as Buffer;
}

/** All of it; throws `BadAnswer` where there is more than that, of which no more is taken then. */
async function bodyOf(response: Response, mostBytes: number): Promise<Uint8Array> {
  const length = response.headers.get("content-length");
  // That many come, and no more. To look at `body` already makes a stream of it, which costs as much as all the rest.
  if (length !== null && Number(length) <= mostBytes) return response.bytes();
  const parts: Uint8Array[] = [];
  let bytes = 0;
  for await (const part of (response.body ?? []) as AsyncIterable<Uint8Array>) {
    bytes += part.length;
    if (bytes > mostBytes) throw badAnswer(`more than ${mostBytes} bytes`);
    parts.push(part);
  }
  return parts.length === 1 ? parts[0]! : Buffer.concat(parts, bytes);
}

function reasonOf(error: unknown): string {
  const { name, code, message } = error as { name?: string; code?: string; message?: string };
  if (name === "TimeoutError") return "no answer in time";
  return code ?? message ?? String(error);
}

// ---------------------------------------------------------------------------------------------------- encoding

/** By RFC 3986, as signatures want it; a "/" stays. */
function encodeKey(key: string): string {
  return key.split("/").map(encodeStrictly).join("/");
}

function encodeStrictly(text: string): string {
  return encodeURIComponent(text).replace(/[!'()*]/g, (sign) => `%${sign.charCodeAt(0).toString(16).toUpperCase()}`);
}

function canonicalQuery(query: Record<string, string | undefined>): string {
  return Object.keys(query)
    .sort()
    .flatMap((name) => (query[name] === undefined ? [] : [`${encodeStrictly(name)}=${encodeStrictly(query[name])}`]))
    .join("&");
}

function escapeXml(text: string): string {
  return text.replace(/[<>&"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
}

/** What XML 1.0 can say, and what no parser normalizes. */
function isXmlText(key: string): boolean {
  return !/[\p{Cc}\ufffe\uffff\u2028]/u.test(key) && key === key.trim();
}
