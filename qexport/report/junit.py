"""The gates as JUnit XML, the form in which CI services show tests.

Elements and attributes are those of the schema that Jenkins' xUnit plugin publishes (junit-10.xsd).
"""

from __future__ import annotations

import re
from xml.etree import ElementTree as Xml

from qexport.report.content import Report

_NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(report: Report) -> str:
    """A suite with a case for each variant; a case fails with the gates that it does not pass."""
    rows = [row for row in report.rows if not row.is_full]
    failed = sum(bool(row.failures) for row in rows)
    suites = Xml.Element("testsuites")
    suite = Xml.SubElement(
        suites,
        "testsuite",
        name=_clean(report.title),
        tests=str(len(rows)),
        failures=str(failed),
        errors="0",
        skipped="0",
    )
    for row in rows:
        case = Xml.SubElement(suite, "testcase", classname="qexport.compare", name=_clean(row.variant))
        case.set("time", f"{row.seconds or 0:.3f}")
        if row.failures:
            message = _clean("; ".join(row.failures))
            Xml.SubElement(case, "failure", message=message, type="GateError").text = message
    Xml.indent(suites)
    return Xml.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _clean(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return _NOT_IN_XML.sub("\ufffd", text)
