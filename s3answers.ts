/**
 * What S3 answers: errors, and the XML of which it makes lists and other answers.
 */

/** Statuses and codes of what may be right a moment later. */
const PASSING = new Set(["SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "OperationAborted"]);

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
  /** It was not the first try: one before it may have come to its end unheard. */
  isRetried = false;
  constructor(code: string, status: number, message: string, cause?: unknown) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = "S3Error";
    this.code = code;
    this.status = status;
  }

  /** It may be right a moment later, and is not about what was asked for. */
  get isPassing(): boolean {
    return this.status === 0 || this.status >= 500 || this.status === 429 || PASSING.has(this.code);
  }
}

export function infoOf(headers: Headers): ObjectInfo {
  const size = Number(headers.get("content-length"));
  const modifiedMs = Date.parse(headers.get("last-modified") ?? "") || 0;
  const mtime = headers.get("x-amz-meta-mtime") ?? undefined;
  return { size, etag: unquote(headers.get("etag") ?? ""), modifiedMs, mtime };
}

export function unquote(etag: string): string {
  return etag.replace(/^(?:W\/)?"(.*)"$/, "$1");
}

// ---------------------------------------------------------------------------------------------------- XML

/**
 * Of XML only what S3 sends is understood: elements without attributes, of which none is within one of the same name.
 * Nothing is expanded but the five entities of XML itself and characters by number.
 */
export function* blocksOf(xml: string, name: string): Generator<string> {
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
export function keyOf(xml: string, name: string, isEncoded: boolean): string | undefined {
  const text = unescapeXml(fieldOf(xml, name) ?? "");
  // What is no UTF-8 has been read as this sign.
  if (!isEncoded) return text.includes("\ufffd") ? undefined : text;
  try {
    return decodeURIComponent(text.replaceAll("+", " "));
  } catch {
    return undefined;
  }
}

export function pageOf(xml: string): ListPage {
  const isEncoded = isEncodedIn(xml);
  const objects: ListedObject[] = [];
  for (const block of blocksOf(xml, "Contents")) {
    objects.push({
      key: keyOf(block, "Key", isEncoded),
      size: Number(fieldOf(block, "Size")),
      etag: unquote(unescapeXml(fieldOf(block, "ETag") ?? "")),
      modified: fieldOf(block, "LastModified") ?? "",
    });
  }
  const prefixes = [...blocksOf(xml, "CommonPrefixes")].map((block) => keyOf(block, "Prefix", isEncoded));
  const isCut = fieldOf(xml, "IsTruncated") === "true";
  const next = isCut ? unescapeXml(fieldOf(xml, "NextContinuationToken") ?? "") : undefined;
  if (next === "") throw new S3Error("BadAnswer", 200, "S3 cut a list and did not say where");
  return { objects, prefixes, next };
}

/** An answer to HEAD has no words: its status has to do. */
export function errorOfXml(status: number, xml: string, what: string): S3Error {
  const code = unescapeXml(fieldOf(xml, "Code") ?? "") || (CODES[status] ?? `Status${status}`);
  const message = unescapeXml(fieldOf(xml, "Message") ?? "");
  return new S3Error(code, status, `${what}: ${code}${message && message !== code ? `: ${message}` : ""}`);
}

const CODES: Record<number, string> = {
  301: "PermanentRedirect",
  403: "AccessDenied",
  404: "NoSuchKey",
  412: "PreconditionFailed",
  416: "InvalidRange",
};
