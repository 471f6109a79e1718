/**
 * What S3 answers: errors, and the XML of which it makes lists and other answers.
 *
 * A status of 200 alone says little: the page of a proxy has it, too, and an answer without the objects that there are is
 * a list of an empty bucket to who does not look. So each answer is looked at for what it has to be, and is `BadAnswer`
 * where it is not: nothing is taken for gone, removed or copied because of it. That may pass, as when a proxy is set right.
 */
import { quote } from "./protocol.ts";

/** Statuses and codes of what may be right a moment later. */
const PASSING = new Set([
  "SlowDown",
  "InternalError",
  "ServiceUnavailable",
  "RequestTimeout",
  "OperationAborted",
  "BadAnswer",
  "IncompleteBody",
]);
/** Of a storage that takes nothing more, whatever its status. */
const FULL = new Set(["QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"]);
/** Characters that are shown of what should not be there. */
const MAX_SHOWN = 60;

/** What a HEAD says of an object. */
export interface ObjectInfo {
  size: number;
  /** Without quotes. */
  etag: string;
  /** Milliseconds since 1970. */
  modifiedMs: number;
  /** What was given with it as `x-amz-meta-mtime`. */
  mtime: string | undefined;
}

export interface ListedObject {
  /** Undefined where its bytes are not UTF-8. */
  key: string | undefined;
  size: number;
  etag: string;
  modified: string;
}

export interface ListPage {
  objects: ListedObject[];
  /** With a delimiter: what the keys that go on behind it have in common, delimiter included. */
  prefixes: (string | undefined)[];
  /** To go on with; undefined at the end. */
  next: string | undefined;
}

/** What S3 answered, or why it did not. */
export class S3Error extends Error {
  /** S3's own (`NoSuchKey`), or `Unreachable`. */
  readonly code: string;
  /** 0 without an answer. */
  readonly status: number;
  /** What S3 calls the request, for who asks there. */
  readonly requestId: string | undefined;
  /** It was not the first try: one before it may have come to its end unheard. */
  isRetried = false;
  /** It was about something that is to be stored. */
  isWrite = false;
  constructor(
    code: string,
    status: number,
    message: string,
    more: { cause?: unknown; requestId?: string | undefined } = {},
  ) {
    super(message, more.cause === undefined ? undefined : { cause: more.cause });
    this.name = "S3Error";
    this.code = code;
    this.status = status;
    this.requestId = more.requestId;
  }

  /** There is no room, until somebody makes some. */
  get isFull(): boolean {
    return this.status === 507 || FULL.has(this.code);
  }

  /** All that is known of why, in a line for the log. */
  get why(): string {
    return `${this.message} (status ${this.status}${this.requestId === undefined ? "" : `, request ${this.requestId}`})`;
  }

  /** It may be right a moment later, and is not about what was asked for. */
  get isPassing(): boolean {
    if (this.isFull || this.status === 501) return false;
    return this.status === 0 || this.status >= 500 || this.status === 429 || PASSING.has(this.code);
  }
}

/** Throws `BadAnswer` where there is no size or etag: the one would be taken for 0, and no read could be under the other. */
export function infoOf(headers: Headers): ObjectInfo {
  const [length, etag] = [headers.get("content-length"), headers.get("etag")];
  const modifiedMs = Date.parse(headers.get("last-modified") ?? "") || 0;
  const mtime = headers.get("x-amz-meta-mtime") ?? undefined;
  return { size: countIn(length, "size"), etag: etagIn(etag), modifiedMs, mtime };
}

function countIn(text: string | null | undefined, what: string): number {
  const count = /^\d+$/.test(text ?? "") ? Number(text) : Number.NaN;
  if (!Number.isSafeInteger(count)) throw badAnswer(`no ${what}, but ${shown(text)}`);
  return count;
}

/** Without quotes. Throws `BadAnswer` where there is none. */
export function etagIn(text: string | null | undefined): string {
  const etag = unquote(unescapeXml(text ?? ""));
  if (etag === "") throw badAnswer("no etag");
  return etag;
}

/** What has come is not what S3 answers to that. Where it came from is added by who asked. */
export function badAnswer(what: string): S3Error {
  return new S3Error("BadAnswer", 200, what);
}

export function isBadAnswer(error: unknown): error is S3Error {
  return error instanceof S3Error && (error.code === "BadAnswer" || error.code === "IncompleteBody");
}

function shown(text: string | null | undefined): string {
  return text === null || text === undefined ? "nothing" : quote(text, MAX_SHOWN);
}

export function unquote(etag: string): string {
  return etag.replace(/^(?:W\/)?"(.*)"$/, "$1");
}

// ---------------------------------------------------------------------------------------------------- XML

/**
 * Of XML only what S3 sends is understood: elements without attributes, of which none is within one of the same name.
 * Nothing is expanded but the five entities of XML itself and characters by number.
 */
function* blocksOf(xml: string, name: string): Generator<string> {
  const [open, close] = [`<${name}>`, `</${name}>`];
  for (let at = xml.indexOf(open); at >= 0; ) {
    const start = at + open.length;
    const end = xml.indexOf(close, start);
    if (end < 0) return;
    yield xml.slice(start, end);
    at = xml.indexOf(open, end + close.length);
  }
}

/** What is in the first of them, as it stands there. */
export function fieldOf(xml: string, name: string): string | undefined {
  return blocksOf(xml, name).next().value ?? undefined;
}

const ENTITIES: Record<string, string> = { lt: "<", gt: ">", amp: "&", quot: '"', apos: "'" };

export function unescapeXml(text: string): string {
  if (!text.includes("&")) return text;
  return text.replace(/&(?:#(\d{1,7})|#x([0-9a-fA-F]{1,6})|(lt|gt|amp|quot|apos));/g, (all, decimal, hex, name) => {
    if (name) return ENTITIES[name]!;
    const code = decimal ? Number(decimal) : Number.parseInt(hex, 16);
    return code <= 0x10ffff ? String.fromCodePoint(code) : all;
  });
}

/** Whether its keys are url-encoded: not every gateway that is asked to does so, and who does says it. */
function isEncodedIn(xml: string): boolean {
  return fieldOf(xml, "EncodingType")?.toLowerCase() === "url";
}

/** Undefined where it is no UTF-8. */
function keyOf(xml: string, name: string, isEncoded: boolean): string | undefined {
  const text = unescapeXml(fieldOf(xml, name) ?? "");
  // What is no UTF-8 has been read as this sign.
  if (!isEncoded) return text.includes("\ufffd") ? undefined : text;
  try {
    return decodeURIComponent(text.replaceAll("+", " "));
  } catch {
    return undefined;
  }
}

/** The one element of which an answer consists. Throws `BadAnswer` where it is another, or is cut. */
export function checkXml(xml: string, name: string): void {
  const root = xml.replace(/^(?:\s|<\?[^>]*>)*/, "").trimEnd();
  const isNamed = root.startsWith(`<${name}`) && /[\s/>]/.test(root[name.length + 1] ?? "");
  const isWhole = root.endsWith(`</${name}>`) || (root.endsWith("/>") && !root.includes(">", root.indexOf("/>") + 2));
  if (!isNamed || !isWhole) throw badAnswer(`no whole ${name}, but ${shown(xml)}`);
}

/** Throws `BadAnswer` also where a key is not one that was asked for: whoever removes what is listed relies on it. */
export function pageOf(xml: string, { prefix, token }: { prefix: string; token?: string | undefined }): ListPage {
  checkXml(xml, "ListBucketResult");
  const isEncoded = isEncodedIn(xml);
  const checkedKey = (block: string, name: string): string | undefined => {
    if (fieldOf(block, name) === undefined) throw badAnswer(`an entry without its ${name}`);
    const key = keyOf(block, name, isEncoded);
    if (key?.startsWith(prefix) === false) throw badAnswer(`${shown(key)} in the list of ${quote(prefix)}`);
    return key;
  };
  const objects: ListedObject[] = [];
  for (const block of blocksOf(xml, "Contents")) {
    objects.push({
      key: checkedKey(block, "Key"),
      size: countIn(fieldOf(block, "Size"), "size"),
      etag: unquote(unescapeXml(fieldOf(block, "ETag") ?? "")),
      modified: fieldOf(block, "LastModified") ?? "",
    });
  }
  const prefixes = [...blocksOf(xml, "CommonPrefixes")].map((block) => checkedKey(block, "Prefix"));
  const after = unescapeXml(fieldOf(xml, "NextContinuationToken") ?? "");
  const next = isCut(xml) ? after : undefined;
  // Taken for all there is, what is behind it would be gone to who asks.
  const isUnsaid = after !== "" && fieldOf(xml, "IsTruncated") === undefined;
  if (next === "" || (next !== undefined && next === token))
    throw badAnswer("a list that is cut and does not say where");
  if (isUnsaid) throw badAnswer("a list that goes on and does not say that it is cut");
  return { objects, prefixes, next };
}

export interface UploadPage {
  uploads: { key: string | undefined; uploadId: string; begunMs: number }[];
  /** To go on with. */
  next: { key: string; id: string } | undefined;
}

/** `token`: where this page begins. */
export function uploadsOf(xml: string, prefix: string, token: UploadPage["next"]): UploadPage {
  checkXml(xml, "ListMultipartUploadsResult");
  const uploads: UploadPage["uploads"] = [];
  for (const block of blocksOf(xml, "Upload")) {
    const [key, uploadId] = [keyOf(block, "Key", false), unescapeXml(fieldOf(block, "UploadId") ?? "")];
    if (uploadId === "" || key?.startsWith(prefix) === false)
      throw badAnswer(`an upload of ${shown(key)} among those of ${quote(prefix)}`);
    uploads.push({ key, uploadId, begunMs: Date.parse(fieldOf(block, "Initiated") ?? "") });
  }
  if (!isCut(xml)) return { uploads, next: undefined };
  const [key = "", id = ""] = ["NextKeyMarker", "NextUploadIdMarker"].map((name) =>
    unescapeXml(fieldOf(xml, name) ?? ""),
  );
  const isSame = key === token?.key && id === token?.id;
  if (key === "" || isSame) throw badAnswer("a list that is cut and does not say where");
  return { uploads, next: { key, id } };
}

/** Whether there is more behind a page. */
function isCut(xml: string): boolean {
  const text = fieldOf(xml, "IsTruncated") ?? "false";
  if (text !== "true" && text !== "false") throw badAnswer(`a list that is cut: ${shown(text)}`);
  return text === "true";
}

/** An answer to HEAD has no words: its status has to do. */
export function errorOfXml(status: number, xml: string, what: string, requestId?: string): S3Error {
  const code = unescapeXml(fieldOf(xml, "Code") ?? "") || (CODES[status] ?? `Status${status}`);
  const message = unescapeXml(fieldOf(xml, "Message") ?? "");
  return new S3Error(code, status, `${what}: ${code}${message && message !== code ? `: ${message}` : ""}`, {
    requestId,
  });
}

const CODES: Record<number, string> = {
  301: "PermanentRedirect",
  403: "AccessDenied",
  404: "NoSuchKey",
  412: "PreconditionFailed",
  416: "InvalidRange",
};
